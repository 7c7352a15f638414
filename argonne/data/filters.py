"""What `argonne prepare` may leave out on purpose: low-quality text, evaluation text. Each reason is counted."""

from __future__ import annotations

QUALITY_FROM_CHARACTERS = 50
LARGEST_DIGIT_SHARE = 0.5
SMALLEST_LETTER_SHARE = 0.3
FEWEST_TOKENS = 10


def is_low_quality(text: str) -> bool:
    """Argonne 2.0's rule: over 50 characters, and mostly digits or hardly any letters and white space."""
    length = len(text)
    if length <= QUALITY_FROM_CHARACTERS:
        return False
    digits = sum(map(str.isdigit, text))
    if digits / length > LARGEST_DIGIT_SHARE:
        return True
    letters = sum(map(str.isalpha, text)) + sum(map(str.isspace, text))
    return letters / length < SMALLEST_LETTER_SHARE
