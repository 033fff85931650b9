"""OLMo 3: OLMo 2 with sliding windows in three of four layers."""

from nuteprune.arch.base import Family
from nuteprune.arch.olmo2 import read

FAMILY = Family("olmo3", read)
