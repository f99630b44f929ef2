"""Reads a request's body: decodes it, bounded, and finds the JSON object in it."""

from __future__ import annotations

import json
import zlib
from typing import Any

from aiohttp import web

from testbed.gateway.refusal import Unanswered

NOT_JSON = (ValueError, RecursionError)  # the second for arrays in arrays in arrays
GZIP_BITS, ZLIB_BITS, BARE_DEFLATE_BITS = 31, 15, -15  # zlib's `wbits`


async def json_object(request: web.Request, max_bytes: int) -> tuple[bytes, dict[str, Any]]:
    """The decoded bytes and the object in them. Raises Unanswered with 400, 413 or 415."""
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(max_bytes) from None
    except web.RequestPayloadError as error:
        raise Unanswered(400, "bad_request", f"the body cannot be read: {error}") from error
    raw = decoded(raw, request.headers.get("Content-Encoding", ""), max_bytes)
    try:
        body = json.loads(raw)
    except NOT_JSON as error:
        raise Unanswered(400, "bad_request", f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Unanswered(400, "bad_request", "the body must be a JSON object")
    return raw, body


def decoded(raw: bytes, coding: str, max_bytes: int) -> bytes:
    """The body without its content coding: gzip, deflate (with zlib's header or bare) or none."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return raw
    if coding in ("gzip", "x-gzip"):
        return _inflated(raw, GZIP_BITS, coding, max_bytes)
    if coding == "deflate":
        bare = bool(raw) and raw[0] & 0x0F != 8  # RFC 1950: 8 is the method that a zlib header names
        return _inflated(raw, BARE_DEFLATE_BITS if bare else ZLIB_BITS, coding, max_bytes)
    message = f"Content-Encoding must be gzip, deflate or identity, got {coding!r}"
    raise Unanswered(415, "bad_request", message, {"Accept-Encoding": "gzip, deflate"})


def _inflated(raw: bytes, bits: int, coding: str, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(bits)
    try:
        text = inflater.decompress(raw, max_bytes + 1)
    except zlib.error as error:
        raise Unanswered(
            400, "bad_request", f"the body is not {coding} as its header says: {error}"
        ) from error
    if len(text) > max_bytes:
        raise _too_large(max_bytes)
    if not inflater.eof or inflater.unused_data:
        raise Unanswered(400, "bad_request", f"the body's {coding} does not end where the body does")
    return text


def _too_large(max_bytes: int) -> Unanswered:
    return Unanswered(413, "bad_request", f"the request is larger than {max_bytes} bytes")
