"""Published figures of the released runs, kept so that a plan can say which of them contradict one another."""

from __future__ import annotations

from dataclasses import dataclass

_TOLERANCE = 0.005


@dataclass(frozen=True)
class Published:
    """Steps, tokens and batch of a release, all of its parts together, and the hours on its devices, as its documents
    give them. None = not published.
    """

    release: str
    steps: int | None = None
    tokens: int | None = None
    tokens_per_step: int | None = None
    batch: str = ""
    hours: float | None = None
    devices: str = ""

    def contradiction(self) -> str | None:
        """One sentence where steps x batch is not the published tokens; None where it is, or where one is not known."""
        if self.steps is None or self.tokens is None or self.tokens_per_step is None:
            return None
        product = self.steps * self.tokens_per_step
        if abs(product / self.tokens - 1) <= _TOLERANCE:
            return None
        return (
            f"{self.release} as published does not close: {self.steps:,} steps x {self.tokens_per_step:,} tokens "
            f"({self.batch}) = {product / 1e9:.2f}B tokens, published are {self.tokens / 1e9:.2f}B"
        )


_A100S = "8 x a100-80gb"  # 1,440 and 1,248 GPU-hours
_1_0 = Published("Argonne 1.0", 160_000, None, None, "48, then 60 documents", 180, _A100S)
_1_5 = Published("Argonne 1.5", 80_000, 15_453_927_424, 756 * 2048, "756 documents in rows of 2,048", 156, _A100S)
_2_0 = Published("Argonne 2.0", 1_347_890, 21_900_000_000, 16_384, "4 rows of 4,096")
_2_5 = Published("Argonne 2.5", 425_975, 76_050_709_610, 245_760, "20 x 4 x 3 rows of 1,024")
_3_0 = Published("Argonne 3.0", 329_148, 76_050_709_610, 233_472, "38 x 2 x 3 rows of 1,024")
# The published figures behind a packaged recipe.
PUBLISHED = {
    "argonne-1.0-pretrain": _1_0,
    "argonne-1.5-pretrain": _1_5,
    "argonne-2.0-pretrain": _2_0,
    "argonne-2.5-pretrain": _2_5,
    "argonne-2.5-continue": _2_5,
    "argonne-3.0-pretrain": _3_0,
    "argonne-3.0-continue": _3_0,
}


@dataclass(frozen=True)
class Measured:
    """Tokens a second over all devices of a whole run of the family's earlier code: what a plan can be held against."""

    release: str
    preset: str
    sequence_length: int
    device: str
    devices: int
    tokens_per_second: int


MEASURED = (
    Measured("Argonne 1.5", "argonne-1.5", 2048, "a100-80gb", 8, 27_500),  # 15.45B tokens in 156 hours
    Measured("Argonne 4.0", "argonne-4.0", 1024, "h100", 3, 61_030),  # 62.1B tokens in 11.8 days
)


# Tokens that the one source of a packaged recipe held at its release, where that was published: for plans made where
# its token set is not.
SOURCE_TOKENS = {
    "argonne-2.5-pretrain": 20_839_021_454,
    "argonne-2.5-continue": 55_211_688_156,
    "argonne-2.5-midtrain": 105_200_000_000,
    "argonne-3.0-pretrain": 20_839_021_454,
    "argonne-3.0-continue": 55_211_688_156,
}
