"""Loaded by schemathesis (SCHEMATHESIS_HOOKS). A made-up URL that Portolan would dial becomes one of this machine where nobody
listens: a fuzzer run sends nothing to any other host. Text that is no http URL stays as it was made."""

import re

import schemathesis

NOBODY = "http://127.0.0.1:1/"
HTTP = re.compile(r"[\x00-\x20]*h\s*t\s*t\s*p\s*s?\s*:", re.IGNORECASE)  # as lenient as URL parsers are


def tame(value, key=None):
    if isinstance(value, dict):
        return {name: tame(it, name) for name, it in value.items()}
    if isinstance(value, list):
        return [tame(it) for it in value]
    if isinstance(value, str) and HTTP.match(value) and not value.startswith("http://127.0.0.1:1"):
        return NOBODY + re.sub(r"[^a-z0-9]", "", value.lower())[:60]
    return value


@schemathesis.hook
def before_call(_context, case, _kwargs):
    if isinstance(case.body, (dict, list)):
        case.body = tame(case.body)
    elif isinstance(case.body, bytes):
        case.body = re.sub(rb"(?i)https?:[^\"'\s]*", NOBODY.encode(), case.body)
