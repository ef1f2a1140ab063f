"""Leaving secrets out of what is written or printed: by the names that they go by, and by how they look."""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

LEFT_OUT = "left out"

_ALWAYS = {"password", "passwd", "passphrase", "passcode", "pwd", "pass", "secret", "secrets", "jwt", "pat"}
_ALWAYS |= {"credential", "credentials", "creds", "authorization", "authentication", "auth", "bearer", "cookie"}
_ALWAYS |= {"passwords", "sas", "sig", "cookies", "headers"}
_ALWAYS |= {"apikey", "apikeys", "apitoken", "accesstoken", "hftoken", "authtoken"}
_BEFORE_KEY = {"api", "access", "secret", "private", "auth", "account", "ssh", "signing", "encryption", "shared"}
_BEFORE_KEY |= {"subscription", "storage", "service", "hf", "wandb", "aws", "azure", "openai", "deploy", "license"}
_BEFORE_TOKENS = {"api", "access", "auth", "hub", "hf", "bearer", "refresh", "session", "user"}
_NAMES = ("name_or_path", "dataset_name", "dataset_config", "output_dir", "_path", "revision")
"""Ends of the names of options that hold names and paths, which are no secrets, credentials in a URL apart."""
# A token of these is one of a text, and so is one that is counted or weighed (`max_token_length`, `token_weights`).
_OF_TEXT = {"pad", "eos", "bos", "unk", "mask", "sep", "cls", "image", "video", "audio", "vision", "speech", "think"}
_OF_TEXT |= {"start", "end", "begin", "stop", "special", "additional", "first", "last", "next", "per", "max", "min"}
_OF_TEXT |= {"boi", "eoi", "bot", "eot", "eom", "fim", "prefix", "suffix", "middle", "time", "text", "chat", "each"}
_OF_TEXT |= {"system", "assistant", "tool", "function", "response", "instruction", "boundary", "placeholder", "word"}
_OF_TEXT |= {"query", "answer", "user", "role", "reasoning", "turn", "object", "message", "document", "content"}
_OF_TEXT |= {"decoder", "separator", "padding", "masked", "unknown", "target", "source", "label", "number", "loss"}

# What looks like prose is left alone: a token has a digit, or stands where only one can stand.
_SCHEME = re.compile(r"\b(bearer|basic)\s+(?=[\w.~+/=-]*\d)[\w.~+/=-]{12,}", re.IGNORECASE)
_AUTHORIZATION = re.compile(r"(authorization[\"']?\s*[:=]\s*[\"']?)(?!left out)[^\"'\n,}]+", re.IGNORECASE)
_IN_URL = re.compile(r"([a-z][\w+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)
_LOOKS = re.compile(
    r"\b(?:(?:hf|ghp|gho|ghu|ghs|ghr|npm|api_org)_[A-Za-z0-9]{20,}"
    r"|(?:nvapi|pypi|dckr_pat|github_pat|glpat|sk|xox[abeprs])[-_](?=[\w-]*\d)[\w-]{16,}"
    r"|AKIA[A-Z0-9]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
_WHOLE = re.compile(r"(?:hf|api_org)_(?=\w*\d)(?=\w*[A-Z])[A-Za-z0-9]{3,}")
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{6,}")
_ASSIGNED = re.compile(
    r"""(?P<before>(?P<name>["']?[\w.-]*\w["']?)\s*[=:]\s*(?!//))(?P<value>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^\s,;&{}\[\]"']+)"""
)


def is_secret(name: str) -> bool:
    """Whether what goes by that name is a secret: `hub_token`, `apiKey`, `X-Auth-Token`; not `pad_token`."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if not words:
        return False
    if _ALWAYS & set(words) or words in (["connection", "string"], ["storage", "options"]):
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
    text = _AUTHORIZATION.sub(rf"\1{LEFT_OUT}", text)
    text = _SCHEME.sub(lambda match: f"{match[1]} {LEFT_OUT}", text)
    text = _LOOKS.sub(LEFT_OUT, text)
    return _ASSIGNED.sub(_assigned, text)


def _of_name(name: str, content: Any) -> Any:
    if isinstance(content, str) and name.endswith(_NAMES):
        return _IN_URL.sub(rf"\1{LEFT_OUT}@", content)
    return LEFT_OUT if content is not None and is_secret(name) else without_secrets(content)


def _assigned(match: re.Match[str]) -> str:
    value = match["value"]
    # `pass: 3` and `header: metadata` of a message are words, where the name is not quoted and nothing is assigned.
    words = match["name"][0] not in "\"'" and "=" not in match["before"] and not _RANDOM.fullmatch(value)
    if words or not is_secret(match["name"]) or LEFT_OUT.startswith(value) or value in ("None", "null"):
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{match['before']}{quote}{LEFT_OUT}{quote}"
