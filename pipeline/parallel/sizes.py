"""Sizes of a model's tensors from its architecture alone, and those that DeepSpeed is given for ZeRO-3; in elements."""

from __future__ import annotations

from nuteprune.arch import FFN, PROJECTIONS, ArchSpec


def projection_shapes(spec: ArchSpec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the seven projections of a layer, those of the FFN of each expert."""
    queries, values = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    d, f = spec.hidden, spec.ffn
    return dict(
        zip(PROJECTIONS, [(queries, d), (values, d), (values, d), (d, queries), (f, d), (f, d), (d, f)], strict=True)
    )


def layer_tensors(spec: ArchSpec) -> list[int]:
    """Elements of every tensor of one decoder layer: projections, their biases, norms."""
    return [*_matrices(spec), *_vectors(spec)]


def _matrices(spec: ArchSpec) -> list[int]:
    """Projections, each of every expert's, and the router."""
    times = {name: spec.experts if name in FFN else 1 for name in PROJECTIONS}
    found = [out * inputs for name, (out, inputs) in projection_shapes(spec).items() for _ in range(times[name])]
    return found if spec.experts == 1 else [*found, spec.experts * spec.hidden]


def _vectors(spec: ArchSpec) -> list[int]:
    shapes = projection_shapes(spec)
    biased = {"o_proj": spec.o_bias, **dict.fromkeys(("q_proj", "k_proj", "v_proj"), spec.qkv_bias)}
    biases = [out for name, (out, _) in shapes.items() if biased.get(name, spec.mlp_bias)]
    norms = [spec.hidden] * len(spec.norms)
    if spec.qk_norm == "head":
        norms += [spec.head_dim] * 2
    elif spec.qk_norm == "width":
        norms += [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim]
    return biases + norms


def total_parameters(spec: ArchSpec) -> int:
    """All parameters of the model, a tied head counted once."""
    return spec.layers * sum(layer_tensors(spec)) + spec.hidden + spec.vocab * spec.hidden * (1 if spec.tied else 2)


def read_parameters(spec: ArchSpec) -> int:
    """Those of them that are read for one token: of the experts only as many as the router chooses."""
    return total_parameters(spec) - spec.prunable + spec.prunable_read


def zero3_sizes(spec: ArchSpec) -> dict[str, int]:
    """DeepSpeed's sizes for ZeRO-3, in elements: one layer is prefetched, and nothing is kept for later reuse.

    Vectors (norms, biases) stay whole on every rank. The matrices of one layer fill the prefetch exactly, and those of
    two the live parameters: with room for one more, the output head would be gathered together with the last layer's,
    and DeepSpeed copies what was gathered together.
    """
    threshold = persistence_threshold(spec)
    matrices = sum(t for t in layer_tensors(spec) if t > threshold)
    return {
        "stage3_param_persistence_threshold": threshold,
        "stage3_prefetch_bucket_size": matrices,
        "stage3_max_live_parameters": 2 * matrices,
        "stage3_max_reuse_distance": 0,
    }


def persistence_threshold(spec: ArchSpec) -> int:
    """Elements up to which ZeRO-3 keeps a tensor whole on every rank: the largest norm or bias."""
    return max(_vectors(spec))


def partitioned(tensors: list[int], ranks: int, threshold: int) -> tuple[int, int]:
    """(elements a gather moves into each rank's buffer, padding included; elements kept whole) under ZeRO-3."""
    big = sum(-(-t // ranks) * ranks for t in tensors if t > threshold)
    return big, sum(t for t in tensors if t <= threshold)
