"""How drafts are judged: token by token, as a block, or lossily. Their names and configs.

The loop is handed the function that `build` gives and knows none of these names.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import ClassVar, final

from pydantic import Field

from fewstep.core.draft import Verify
from fewstep.core.recipe import Config
from fewstep.decode.block import verify_block
from fewstep.decode.typical import verify_typical
from fewstep.decode.verify import verify


class VerificationConfig(Config):
    """A way to judge drafts. `lossless`: what is emitted has exactly the target's law, whatever was drafted."""

    lossless: ClassVar[bool] = True

    @abstractmethod
    def build(self) -> Verify:
        """The function that judges trees."""
        ...

    def exact(self) -> Verify:
        """The same where the target's law is asked for. Raises ValueError if this way changes it."""
        if not self.lossless:
            raise ValueError(f"verification={self.kind!r}: lossy, its output has another law; choose 'token' or 'block'")
        return self.build()

    @property
    def label(self) -> str:
        """The name to print: what is lossy says so."""
        return self.kind if self.lossless else f"{self.kind} (lossy)"


@final
class TokenVerificationConfig(VerificationConfig):
    """Token by token, for chains and trees of chosen and drawn nodes."""

    kind: ClassVar[str] = "token"
    source: ClassVar[str] = "Leviathan et al. 2023, arXiv 2211.17192; Miao et al. 2023, arXiv 2305.09781"

    def build(self) -> Verify:
        return verify


@final
class BlockVerificationConfig(VerificationConfig):
    """A drafted chain as a whole, which keeps at least as many tokens in expectation; trees are refused."""

    kind: ClassVar[str] = "block"
    source: ClassVar[str] = "Sun et al. 2024, arXiv 2403.10444"

    def build(self) -> Verify:
        return verify_block


@final
class TypicalVerificationConfig(VerificationConfig):
    """Lossy: drafted tokens likelier than min(`epsilon`, `delta` exp(-entropy)) are kept; greedy rows are judged exactly."""

    kind: ClassVar[str] = "typical"
    source: ClassVar[str] = "Cai et al. 2024, Medusa, arXiv 2401.10774, section 2.3.1"
    claims: ClassVar[tuple[str, ...]] = ("typical-acceptance",)
    lossless: ClassVar[bool] = False

    epsilon: float = Field(default=0.09, gt=0, le=1)
    delta: float = Field(default=0.3, gt=0, le=1)

    def build(self) -> Verify:
        return partial(verify_typical, epsilon=self.epsilon, delta=self.delta)


VERIFICATIONS: Mapping[str, type[VerificationConfig]] = MappingProxyType(
    {config.kind: config for config in (TokenVerificationConfig, BlockVerificationConfig, TypicalVerificationConfig)}
)
