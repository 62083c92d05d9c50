"""S4 and S4D: a linear state space for each channel, the same at every token, whose parallel form is a convolution.

S4 steps through the dense matrix of HiPPO as a diagonal plus one of rank one; S4D keeps the diagonal.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu, glu

from fewstep.core.position import NoPosition
from fewstep.core.recipe import Config
from fewstep.nn import scan
from fewstep.nn.hippo import diagonal_plus_low_rank
from fewstep.nn.recurrent import Carry, Inputs, Links, even_heads, wide


class StateSpaceConfig(Config):
    """`state`: states of each channel, half as many complex ones. The first steps are log-uniform in `step_min` to `step_max`."""

    state: int = Field(default=64, ge=2, multiple_of=2)
    step_min: float = Field(default=1e-3, gt=0)
    step_max: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> "StateSpaceConfig":
        if self.step_min > self.step_max:
            raise ValueError(f"step_min={self.step_min}: must be at most step_max={self.step_max}; lower it")
        return self

    def widths(self, width: int, heads: int) -> tuple[int, int]:
        return heads, even_heads(width, heads)


@final
class S4Config(StateSpaceConfig):
    """S4, from HiPPO-LegS, by the bilinear rule."""

    kind: ClassVar[str] = "s4"
    source: ClassVar[str] = "Gu et al. 2021, arXiv 2111.00396"
    claims: ClassVar[tuple[str, ...]] = ("selective-copying", "induction-heads")

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "S4":
        return S4(self, width)


@final
class S4DConfig(StateSpaceConfig):
    """S4D. `start`: where its eigenvalues begin, at -1/2 + i pi n ("lin"), on the curve of "inv", or as S4's do ("legs"); `rule`:
    how time becomes steps, zero-order hold or bilinear."""

    kind: ClassVar[str] = "s4d"
    source: ClassVar[str] = "Gu et al. 2022, arXiv 2206.11893"

    start: Literal["lin", "inv", "legs"] = "lin"
    rule: Literal["zoh", "bilinear"] = "zoh"

    def build(self, *, width: int, heads: int, position: NoPosition | None = None) -> "S4D":
        return S4D(self, width)


@final
@dataclass(frozen=True, eq=False, slots=True)
class Tables:
    """What T tokens of a sequence are to one another, to the states before them and to those after; S = 2M parts of M states.

    `kernel` [D,T]: what a token reads of the one so many before it. `read` [D,T,S]: what each reads of the states before them
    all. `write` [D,S,T]: what each leaves in the states after them all. `jump`: states [D,S,B] T tokens later.
    """

    kernel: Tensor
    read: Tensor
    write: Tensor
    jump: Callable[[Tensor], Tensor]


class StateSpace(scan.Scanned):
    """h_t = A h_{t-1} + B u_t, y_t = 2 Re(C h_t) + D u_t for each channel, M = `state` / 2 complex states; then GELU and GLU.

    Cost: 2 T (T + 4 M) a channel for a chunk of T in the parallel form, whose T x T part is a convolution; else about 8 M a token
    and channel. State: M complex numbers a channel.
    """

    encodings: frozenset[str] = frozenset()  # states order the tokens

    def __init__(self, config: StateSpaceConfig, width: int) -> None:
        super().__init__()
        self.states = config.state // 2
        low, high = math.log(config.step_min), math.log(config.step_max)
        self.step_log = nn.Parameter(torch.empty(width).uniform_(low, high))
        self.c = nn.Parameter(torch.randn(width, self.states, 2) * 0.5**0.5)  # as all that is complex: real, imaginary
        self.skip = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, 2 * width)

    @property
    def width(self) -> int:
        return self.out.in_features

    @abstractmethod
    def tables(self, count: int) -> Tables:
        """Of `count` tokens."""

    def inputs(self, features: Tensor, before: Tensor, positions: Tensor) -> Inputs:
        return (wide(features),)

    def begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Carry:
        one = wide(torch.empty(0, device=device, dtype=dtype))
        return (torch.zeros(batch, self.width, self.states, device=device, dtype=one.dtype.to_complex()),)

    def sweep(self, inputs: Inputs, place: Tensor) -> Tensor:
        """By chunks of which every sequence begins one of its own, so that they all share their tables."""
        (u,) = inputs
        (batch, _, width), size = u.shape, min(self.chunk, u.shape[1])
        block = (place % size == 0).cumsum(1) - 1
        count = int(block.max()) + 1
        index = (block * size + place % size).unsqueeze(-1).expand_as(u)
        x = u.new_zeros(batch, count * size, width).scatter(1, index, u)
        x = x.view(batch, count, size, width).permute(3, 2, 0, 1).flatten(2)
        first = torch.zeros(batch, count, dtype=torch.bool, device=u.device).scatter(1, block, place < size)
        tables = self.tables(size)
        back = torch.arange(size, device=u.device).unsqueeze(1) - torch.arange(size, device=u.device)
        y = torch.where(back >= 0, tables.kernel[:, back.clamp(min=0)], 0) @ x
        added, states = (tables.write @ x).unflatten(2, (batch, count)), []
        h = torch.zeros_like(added[..., 0])
        for k in range(count):
            h = torch.where(first[:, k], 0, h)
            states.append(h)
            h = tables.jump(h) + added[..., k]
        y = y + tables.read @ torch.stack(states, 3).flatten(2)
        return y.unflatten(2, (batch, count)).permute(2, 3, 1, 0).reshape(batch, -1, width).gather(1, index)

    def finish(self, y: Tensor, features: Tensor) -> Tensor:
        y = gelu(y + wide(features) * self.skip)
        return glu(self.out(y.to(features.dtype)), -1)


@final
class S4D(StateSpace):
    """The diagonal state space: A = diag(exp(step lam)) where the rule is zero-order hold, Re lam < 0, B = 1.

    Differs: B is not trained, as only its product with C matters; eigenvalues are each channel's own.
    """

    def __init__(self, config: S4DConfig, width: int) -> None:
        super().__init__(config, width)
        self.rule = config.rule
        n, states = torch.arange(self.states), config.state
        match config.start:
            case "lin":
                lam = torch.complex(torch.full((self.states,), -0.5), math.pi * n)
            case "inv":
                lam = torch.complex(torch.full((self.states,), -0.5), states / math.pi * (states / (2 * n + 1) - 1))
            case "legs":
                lam = diagonal_plus_low_rank(states).lam
        self.fading = nn.Parameter((-lam.real).log().float().repeat(width, 1))
        self.turning = nn.Parameter(lam.imag.float().repeat(width, 1))

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        return 2 * (scan.along(*self._steps(inputs), carry[0], links) * _complex(self.c)).real.sum(-1)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        return (scan.after(*self._steps(inputs), carry[0], real),)

    def tables(self, count: int) -> Tables:
        a, b = self._discrete()
        c, powers, step = _complex(self.c), torch.ones_like(a).unsqueeze(-1), a.unsqueeze(-1)
        while powers.shape[-1] <= count:
            powers, step = torch.cat([powers, powers * step], -1), step * step
        left, later = powers[..., :count] * b.unsqueeze(-1), powers[..., 1 : count + 1] * c.unsqueeze(-1)
        far = powers[..., count].unsqueeze(-1)

        def jump(h: Tensor) -> Tensor:
            real, imaginary = h.chunk(2, 1)
            return torch.cat([far.real * real - far.imag * imaginary, far.real * imaginary + far.imag * real], 1)

        kernel = 2 * (c.unsqueeze(1) @ left).squeeze(1).real
        return Tables(kernel, 2 * _parts(later.conj(), 1).mT, _parts(left.flip(-1), 1), jump)

    def _steps(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        (u,) = inputs
        a, b = self._discrete()
        added = b * u.unsqueeze(-1)
        return a.expand_as(added), added

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """A and B [D,M] from token to token."""
        step, lam = wide(self.step_log).exp().unsqueeze(-1), torch.complex(-wide(self.fading).exp(), wide(self.turning))
        if self.rule == "zoh":
            a = (step * lam).exp()
            return a, (a - 1) / lam
        left = 1 - step / 2 * lam
        return (1 + step / 2 * lam) / left, step / left


@final
class S4(StateSpace):
    """The state space of A = diag(lam) - p p*, which begins as HiPPO-LegS, by the bilinear rule (section 2.3, theorem 2).

    The recurrence takes O(M) a token: the inverse in it is diagonal plus rank one too (Woodbury, appendix C.2). Differs: the
    parallel form takes powers of the dense matrices by doubling, in chunks, where the paper evaluates the generating function of
    a convolution as long as the sequence (theorem 3); lam has a real part below 0 by its form (exp); every channel has its own
    lam, p and B.
    """

    def __init__(self, config: S4Config, width: int) -> None:
        super().__init__(config, width)
        form = diagonal_plus_low_rank(config.state)
        self.fading = nn.Parameter((-form.lam.real).log().float().repeat(width, 1))
        self.turning = nn.Parameter(form.lam.imag.float().repeat(width, 1))
        self.p, self.b = (nn.Parameter(torch.view_as_real(x).float().repeat(width, 1, 1)) for x in (form.p, form.b))

    def read(self, carry: Carry, inputs: Inputs, links: Links) -> Tensor:
        (u,), step, parent = inputs, self._step(), scan.parents(links)
        # in front of the tokens stand nothing, for the parent -2, and what is carried, for -1
        states = torch.cat([torch.zeros_like(carry[0]).unsqueeze(1), carry[0].unsqueeze(1)], 1)
        states = torch.cat([states, states.new_zeros(*u.shape, self.states)], 1)
        rows = torch.arange(u.shape[0], device=u.device)
        for t in range(u.shape[1]):
            states[:, t + 2] = step(states[rows, parent[:, t] + 2], u[:, t])
        return 2 * (states[:, 2:] * _complex(self.c)).real.sum(-1)

    def advance(self, carry: Carry, inputs: Inputs, real: Tensor) -> Carry:
        (h,), (u,), step = carry, inputs, self._step()
        for t in range(u.shape[1]):
            h = torch.where(real[:, t, None, None], step(h, u[:, t]), h)
        return (h,)

    def tables(self, count: int) -> Tables:
        step, c = self._step(), _complex(self.c)
        one = torch.eye(2 * self.states, dtype=c.real.dtype, device=c.device)
        each = torch.complex(*one.chunk(2, 1)).unsqueeze(1).expand(-1, self.width, -1)  # states that hold one part alone
        nothing = c.real.new_zeros(1, self.width)
        a = _parts(step(each, nothing), 2).permute(1, 2, 0)
        write = _parts(step(torch.zeros_like(each[:1]), nothing + 1), 2).permute(1, 2, 0)
        row = 2 * _parts(c.conj(), 1).unsqueeze(1)
        read, power = row @ a, a
        while write.shape[2] < count:
            write, read, power = torch.cat([write, power @ write], 2), torch.cat([read, read @ power], 1), power @ power
        write, far = write[:, :, :count], power if write.shape[2] == count else torch.linalg.matrix_power(a, count)
        return Tables((row @ write).squeeze(1), read[:, :count], write.flip(-1), lambda h: far @ h)

    def _step(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The states [...,D,M] after a token with inputs [...,D]: (I - dt/2 A)^-1 ((I + dt/2 A) h + dt B u)."""
        rate = 2 / wide(self.step_log).exp().unsqueeze(-1)
        lam = torch.complex(-wide(self.fading).exp(), wide(self.turning))
        p, b = _complex(self.p), 2 * _complex(self.b)
        inverse = 1 / (rate - lam)
        pulled = inverse * p / (1 + _both(p, inverse * p))

        def step(h: Tensor, u: Tensor) -> Tensor:
            h = inverse * ((rate + lam) * h - p * _both(p, h) + b * u.unsqueeze(-1))
            return h - pulled * _both(p, h)

        return step


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(wide(x))


def _parts(z: Tensor, dim: int) -> Tensor:
    return torch.cat([z.real, z.imag], dim)


def _both(p: Tensor, h: Tensor) -> Tensor:
    """p* h over the states and their conjugates, [...,1]."""
    return 2 * (p.conj() * h).real.sum(-1, keepdim=True)
