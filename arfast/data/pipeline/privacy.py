"""Personal data in text, replaced by a placeholder of its kind.

The kinds of Penedo et al. 2024 (arXiv 2406.17557), section 3.7, and Soldaini et al. 2024 (arXiv 2402.00159), section
5.3: mail addresses (RFC 5321), public IP addresses, telephone numbers (ITU-T E.164 with "+", and the North American
form), and card numbers (ISO/IEC 7812-1: first digit 3 to 6, Luhn's check digit). Every pattern takes linear time.
"""

import ipaddress
import re
from collections.abc import Callable

_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9@])"
)
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w]|\.\w)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\w)")
_CARD = re.compile(r"(?<![\w.,-])[3-6](?:[ -]?[0-9]){12,18}(?![\w]|[.,-][0-9])")
_PHONE = re.compile(r"(?<![\w+.])\+[1-9](?:[ .()/-]{0,2}[0-9]){6,14}(?![\w])")
_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+-])(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-. ][0-9]{4}(?![\w]|[-.][0-9])"
)


def luhn_valid(digits: str) -> bool:
    """Whether the last digit is the check digit of the others: Luhn, US patent 2950048.

    >>> luhn_valid("4111111111111111"), luhn_valid("4111111111111112")
    (True, False)
    """
    doubled = sum(int("0246813579"[int(digit)]) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_public(address: str) -> bool:
    """Private, local, reserved and documentation addresses are nobody's."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_card(match: str) -> bool:
    return luhn_valid("".join(filter(str.isdigit, match)))


# For each kind: what a text must hold for the pattern to have a chance, and is found faster; the pattern; the check of
# what it finds.
_FINDERS = {
    "email": [(re.compile("@"), _EMAIL, bool)],
    "ip_address": [
        (re.compile(r"\.[0-9]{1,3}\.[0-9]"), _IPV4, _is_public),
        (re.compile(":[0-9A-Fa-f]{0,4}:"), _IPV6, _is_public),
    ],
    "credit_card": [(re.compile("[3-6](?:[ -]?[0-9]){12}"), _CARD, _is_card)],
    "phone_number": [
        (re.compile(r"\+[1-9]"), _PHONE, bool),
        (re.compile("[2-9][0-9]{2}[-. ][0-9]{4}"), _NORTH_AMERICAN, bool),
    ],
}


def _mask(text: str, pattern: re.Pattern, accept: Callable[[str], bool], placeholder: str) -> tuple[str, int]:
    found = 0

    def replace(match: re.Match) -> str:
        nonlocal found
        if not accept(match[0]):
            return match[0]
        found += 1
        return placeholder

    return pattern.sub(replace, text), found


def mask_personal_data(text: str, kinds: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    """(text with placeholders, how many of each kind were found).

    >>> mask_personal_data("Write to jo@example.org or +49 30 901820.", ("email", "phone_number"))
    ('Write to [EMAIL] or [PHONE_NUMBER].', {'email': 1, 'phone_number': 1})
    """
    counts = {}
    for kind in kinds:
        for needed, pattern, accept in _FINDERS[kind]:
            if needed.search(text):
                text, found = _mask(text, pattern, accept, f"[{kind.upper()}]")
                counts[kind] = counts.get(kind, 0) + found
    return text, {kind: found for kind, found in counts.items() if found}
