"""Separates the characters of Chinese and Japanese text, which has no spaces, so that scores compare characters.

Han characters and kana become words of their own. Otherwise, a whole clause would be one word, which hardly any other
caption contains. Text without such characters is not changed.
"""

import re

from captionlib.data.text.vocabulary import tokenize

__all__ = ["separate_characters"]

_CHARACTER = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def separate_characters(text: str) -> str:
    """Returns normalized words and characters, joined by spaces, if the text has Han characters or kana.

    Other text is returned unchanged.
    """
    if not _CHARACTER.search(text):
        return text
    return " ".join(_CHARACTER.sub(r" \g<0> ", " ".join(tokenize(text))).split())
