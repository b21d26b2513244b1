"""From generated text to an answer: the first option named (LLM-Adapters), or the number it ends with (GSM8K)."""

import re

# The option names of each task; the first one in a generated text is the answer (LLM-Adapters).
CHOICES = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "social_i_qa": "answer1|answer2|answer3|answer4|answer5",
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
    "ARC-Easy": "answer1|answer2|answer3|answer4|answer5",
    "ARC-Challenge": "answer1|answer2|answer3|answer4|answer5",
    "openbookqa": "answer1|answer2|answer3|answer4|answer5",
}
# A minus after a word or a number is a dash or a subtraction ("5-3"), not a sign.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def first_match(pattern: re.Pattern[str], text: str) -> str:
    """The first match in a text, "" where there is none."""
    found = pattern.search(text)
    return found.group() if found else ""


def last_number(text: str) -> str:
    """
    The number after the last "####", else the last number of a text, as plain digits ("1,234.50" -> "1234.5").

    "" where there is none.
    """
    marked = text.rsplit("####", 1)
    found = (_NUMBER.findall(marked[1])[:1] if len(marked) == 2 else []) or _NUMBER.findall(text)[-1:]
    if not found:
        return ""
    digits = found[0].replace("$", "").replace(",", "")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    digits = digits.lstrip("0") or "0"
    digits = "0" + digits if digits.startswith(".") else digits
    return digits if digits == "0" else sign + digits
