"""Complex-valued positions: a word's numbers are waves, and its position is how far they have run."""

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fewstep.core.position import NoPosition
from fewstep.nn.position.encoding import EncodingConfig, one_axis, wide
from fewstep.nn.position.rope import powers, tables, turn


@final
class ComplexConfig(EncodingConfig):
    """Complex-valued word embeddings: amplitude and initial phase of each word, learned frequencies that all words share."""

    kind: ClassVar[str] = "complex"
    source: ClassVar[str] = "Wang et al. 2019, arXiv 1912.12333"

    def build(self, *, head_width: int, width: int | None = None, heads: int = 1) -> "Complex":
        width = width or heads * head_width
        if width % 2:
            raise ValueError(f"width={width}: complex numbers take two channels each; choose an even width")
        return Complex(width)


@final
class Complex(NoPosition):
    """r_j e^(i (w_j pos + theta_j)), where channels j and j + D/2 of the input are the two parts of r_j e^(i theta_j).

    Source: arXiv 1912.12333. Differs: the frequencies w_j are the same for all words (one of the paper's sharing schemes,
    since an encoding sees activations and not words), and the layers behind it are real, over the D/2 pairs. In bfloat16 the
    frequencies have 8 bits, and far positions blur.
    """

    kind = "complex"
    parts = frozenset({"embed"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(powers(10000.0, width, torch.get_default_device(), torch.float32))

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = one_axis(positions, self.kind).to(wide(x)).unsqueeze(-1) * self.frequencies.to(wide(x))
        return turn(x, *tables(angles, x.dtype))
