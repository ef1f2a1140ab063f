"""Leaving secrets out of what is written or printed: by the names that they go by, and by how they look."""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

LEFT_OUT = "left out"

_ALWAYS = {"password", "passwd", "passphrase", "passcode", "pwd", "pass", "secret", "secrets", "jwt", "pat"}
_ALWAYS |= {"credential", "credentials", "creds", "authorization", "authentication", "auth", "bearer", "cookie"}
_ALWAYS |= {"cookies", "header", "headers", "apikey", "apikeys", "apitoken", "accesstoken", "hftoken", "authtoken"}
_BEFORE_KEY = {"api", "access", "secret", "private", "auth", "account", "ssh", "signing", "encryption", "shared"}
_BEFORE_KEY |= {"subscription", "storage", "service", "hf", "wandb", "aws", "azure", "openai", "deploy", "license"}
_BEFORE_TOKENS = {"api", "access", "auth", "hub", "hf", "bearer", "refresh", "session", "user"}
# A token of these is one of a text, and so is one that is counted or weighed (`max_token_length`, `token_weights`).
_OF_TEXT = {"pad", "eos", "bos", "unk", "mask", "sep", "cls", "image", "video", "audio", "vision", "speech", "think"}
_OF_TEXT |= {"start", "end", "begin", "stop", "special", "additional", "first", "last", "next", "per", "max", "min"}
_OF_TEXT |= {"boi", "eoi", "bot", "eot", "eom", "fim", "prefix", "suffix", "middle", "time", "text", "chat", "each"}
_OF_TEXT |= {"system", "assistant", "tool", "function", "response", "instruction", "boundary", "placeholder", "word"}
_OF_TEXT |= {"decoder", "separator", "padding", "masked", "unknown", "target", "source", "label", "number", "loss"}

_SCHEME = re.compile(r"\b(bearer|basic|token)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_IN_URL = re.compile(r"([a-z][\w+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)
_LOOKS = re.compile(
    r"\b(?:(?:hf|ghp|gho|ghu|ghs|ghr|npm|nvapi|pypi|dckr_pat|github_pat|glpat|api_org|sk|xox[abeprs])[-_][\w-]{16,}"
    r"|AKIA[A-Z0-9]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_WHOLE = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{3,}")
_ASSIGNED = re.compile(
    r"""(?P<before>(?P<name>["']?[\w.-]*\w["']?)\s*[=:]\s*(?!//))(?P<value>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^\s,;&{}\[\]"']+)"""
)


def is_secret(name: str) -> bool:
    """Whether what goes by that name is a secret: `hub_token`, `apiKey`, `X-Auth-Token`; not `pad_token`."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if not words:
        return False
    if _ALWAYS & set(words) or {"connection", "string"} <= set(words):
        return True
    pairs = list(pairwise(words))
    if any(word in ("key", "keys") and before in _BEFORE_KEY for before, word in pairs):
        return True
    if any(word == "tokens" and before in _BEFORE_TOKENS for before, word in pairs):
        return True
    if words[-1] == "value" and len(words) > 1:
        return is_secret("_".join(words[:-1]))
    return words[-1] == "token" and not _OF_TEXT & set(words[:-1])


def without_secrets(value: Any) -> Any:
    """A copy of JSON values, mappings and lists in any depth, with [`LEFT_OUT`] in the place of each secret.

    Text is looked through for credentials in URLs, tokens that are known by their form, `name=value` and JSON.
    """
    if isinstance(value, Mapping):
        return {name: _of_name(str(name), content) for name, content in value.items()}
    if isinstance(value, list | tuple | set):
        return [without_secrets(content) for content in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Text with [`LEFT_OUT`] in the place of each secret in it."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            pass
        else:
            safe = without_secrets(content)
            return text if safe == content else json.dumps(safe)
    if _WHOLE.fullmatch(text):
        return LEFT_OUT
    text = _IN_URL.sub(rf"\1{LEFT_OUT}@", text)
    text = _SCHEME.sub(lambda match: f"{match[1]} {LEFT_OUT}", text)
    text = _LOOKS.sub(LEFT_OUT, text)
    return _ASSIGNED.sub(_assigned, text)


def _of_name(name: str, content: Any) -> Any:
    return LEFT_OUT if content is not None and is_secret(name) else without_secrets(content)


def _assigned(match: re.Match[str]) -> str:
    value = match["value"]
    if not is_secret(match["name"]) or LEFT_OUT.startswith(value) or value in ("None", "null"):
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{match['before']}{quote}{LEFT_OUT}{quote}"
