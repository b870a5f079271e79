"""DH-HMAC-CHAP worked out a second time, from the specifications and with Python's own arithmetic.

The engine's answers are compared with this file's in `crates/nvmf/tests/auth.rs`, by way of
`auth-vectors.json`, which has to be what is computed here: `python test_node_auth_vectors.py` in
this folder writes it. What is checked: the groups of RFC 7919 (from their formula, and that they
are safe primes), secrets as text, key transformation, challenges, responses and every message byte
by byte (NVM Express Base 2.0, 8.13). Nothing is shared with the engine but the specifications.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

Vector = dict[str, Any]
VECTORS = Path(__file__).parents[1] / "crates/nvmf/tests/auth-vectors.json"

HASHES = {1: "sha256", 2: "sha384", 3: "sha512"}
# Identifier: (bits, X of RFC 7919, appendix A).
GROUPS = {
    1: (2048, 560316),
    2: (3072, 2625351),
    3: (4096, 5736041),
    4: (6144, 15705020),
    5: (8192, 10965728),
}
HOST = "nqn.2014-08.org.nvmexpress:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
SUBSYSTEM = "nqn.2026-11.io.tercet:volume:30313233-3435-3637-3839-616263646566"


def prime(group: int) -> int:
    """p = 2^b - 2^(b-64) + ([2^(b-130) e] + X) 2^64 - 1."""
    bits, offset = GROUPS[group]
    scale = bits - 130
    guard = 256
    term: int = 1 << (scale + guard)
    total = term
    k = 1
    while term:
        term //= k
        total += term
        k += 1
    return (1 << bits) - (1 << bits - 64) + ((total >> guard) + offset << 64) - 1


def is_prime(number: int) -> bool:
    """Miller-Rabin to four bases: the numbers are no adversary's."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def secret_text(key: bytes, transform: int) -> str:
    whole = key + struct.pack("<I", zlib.crc32(key))
    return f"DHHC-1:{transform:02}:{base64.b64encode(whole).decode()}:"


def transformed(key: bytes, transform: int, nqn: str) -> bytes:
    if transform == 0:
        return key
    return hmac.digest(key, nqn.encode() + b"NVMe-over-Fabrics", HASHES[transform])


def response(
    name: str, key: bytes, nonce: bytes, shared: bytes, numbers: tuple[int, int], who: bytes
) -> bytes:
    sequence, transaction = numbers
    if shared:
        nonce = hmac.digest(hashlib.new(name, shared).digest(), nonce, name)
    nqns = (HOST, SUBSYSTEM) if who == b"HostHost" else (SUBSYSTEM, HOST)
    text = nonce + struct.pack("<IHB", sequence, transaction, 0) + who
    return hmac.digest(key, text + nqns[0].encode() + b"\0" + nqns[1].encode(), name)


def vector(draw: random.Random, hash_id: int, group: int, key_bytes: int, transform: int) -> Vector:
    """One exchange in both directions; the engine's machines are to say the very same."""
    name = HASHES[hash_id]
    size = hashlib.new(name).digest_size
    keys = [draw.randbytes(key_bytes), draw.randbytes(key_bytes)]
    # What each side draws: 64 bytes of nonce, 64 of exponent, a number.
    drawn = [draw.randbytes(132), draw.randbytes(132)]
    nonces = [bytes_[:size] for bytes_ in drawn]
    exponents = [int.from_bytes(bytes_[64:128], "big") for bytes_ in drawn]
    sequences = [struct.unpack("<I", bytes_[128:])[0] for bytes_ in drawn]
    transaction = draw.randrange(1 << 16)
    publics, shared = [b"", b""], b""
    if group:
        p = prime(group)
        length = GROUPS[group][0] // 8
        publics = [pow(2, exponent, p).to_bytes(length, "big") for exponent in exponents]
        shared = pow(2, exponents[0] * exponents[1], p).to_bytes(length, "big")
    host_key = transformed(keys[0], transform, HOST)
    controller_key = transformed(keys[1], transform, SUBSYSTEM)
    answers = [
        response(name, host_key, nonces[0], shared, (sequences[0], transaction), b"HostHost"),
        response(
            name, controller_key, nonces[1], shared, (sequences[1], transaction), b"Controller"
        ),
    ]
    negotiate = struct.pack("<BBHHBB", 0, 0, 0, transaction, 0, 1)
    negotiate += struct.pack("<BBBB30s30s", 1, 0, 1, 1, bytes([hash_id]), bytes([group]))
    challenge = struct.pack(
        "<BBHHBBBBHI", 1, 1, 0, transaction, size, 0, hash_id, group, len(publics[0]), sequences[0]
    )
    challenge += nonces[0] + publics[0]
    head = struct.pack(
        "<BBHHBBBBHI", 1, 2, 0, transaction, size, 0, 1, 0, len(publics[1]), sequences[1]
    )
    reply = head + answers[0] + nonces[1] + publics[1]
    success1 = struct.pack("<BBHHBBB7s", 1, 3, 0, transaction, size, 0, 1, b"") + answers[1]
    success2 = struct.pack("<BBHH10s", 1, 4, 0, transaction, b"")
    short = {"negotiate": negotiate, "success1": success1, "success2": success2}
    long = {"challenge": challenge, "reply": reply}
    return {
        "hash": hash_id,
        "group": group,
        "secrets": [secret_text(key, transform) for key in keys],
        "random": [bytes_.hex() for bytes_ in drawn],
        "transaction": transaction,
        **{which: message.hex() for which, message in short.items()},
        **{f"{which}_sha256": hashlib.sha256(m).hexdigest() for which, m in long.items()},
    }


def vectors() -> Vector:
    draw = random.Random("DH-HMAC-CHAP")
    exchanges = [
        vector(draw, hash_id, group, key_bytes, transform)
        for hash_id in HASHES
        for group in (0, *GROUPS)
        for key_bytes, transform in [((32, 48, 64)[(hash_id + group) % 3], (hash_id + group) % 4)]
    ]
    primes = {
        str(group): hashlib.sha256(prime(group).to_bytes(bits // 8, "big")).hexdigest()
        for group, (bits, _) in GROUPS.items()
    }
    return {"host": HOST, "subsystem": SUBSYSTEM, "primes_sha256": primes, "exchanges": exchanges}


def test_the_groups_are_safe_primes_as_rfc_7919_writes_them() -> None:
    for group, (bits, _) in GROUPS.items():
        number = prime(group)
        assert number.bit_length() == bits
        # The RFC's hexadecimal form begins and ends so in each group.
        assert f"{number:x}".startswith("ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1")
        assert number % 2**64 == 2**64 - 1
    for group in (1, 2):
        number = prime(group)
        assert is_prime(number)
        assert is_prime(number // 2)


def test_the_vectors_of_the_engine_are_these() -> None:
    assert json.loads(VECTORS.read_text()) == vectors()


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(vectors(), indent=1) + "\n")
