"""The KL term: T²·KL(teacher‖student) of the logits over the full vocabulary."""

from torch import Tensor

from nuteprune.model.losses.base import OutputTerm, log_softmax_


class Kl(OutputTerm):
    """T²·KL(teacher‖student), its gradient T·(q − p)."""

    name = "kl"
    copies = 2  # the teacher's logits, p

    def of_chunk(self, student, teacher, labels, config) -> tuple[Tensor, Tensor]:
        """See `OutputTerm`; both logits are overwritten."""
        temperature = config.temperature
        log_q, log_p = (log_softmax_(logits.div_(temperature)) for logits in (student, teacher))
        p = log_p.exp()
        loss = temperature**2 * log_p.sub_(log_q).mul_(p).sum()
        return loss, log_q.exp_().sub_(p).mul_(temperature)
