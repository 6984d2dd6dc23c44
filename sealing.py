"""Sealing: octets that only holders of the key file can read or make, for those who may not.

What leaves the house and comes back, or waits in somebody else's memory, is sealed: ephemeral keys
(keys.py) and records of conversations. Encrypted, authenticated, and bound to what it is for.

    octet 0        key id (3 bits) | version 0 (5 bits)              in the clear, authenticated
    octets 1-16    salt, drawn anew each time
    the rest       AES-256-GCM of the content, its tag of 16 octets at the end

    key   = HMAC-SHA256(K_seal[key id], purpose | 0x00 | salt)
    nonce = twelve zero octets
    associated data = octet 0 | context

Rules that stay true:
- Each seal has a key of its own, made from a salt of 128 bits: the nonce can stay zero, and any
  number of instances may seal for years without telling each other of nonces. A random nonce alone
  would have 96 bits, with a bound on how many may be drawn (SP 800-38D section 8.3).
- What is sealed for one purpose opens for no other, and under no other context.
- Total: any octets end in the content or in None. Why it did not open is nobody's business.

AES-GCM: https://csrc.nist.gov/pubs/sp/800/38/d/final

Sans-IO: the salt is an argument.
"""

import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import ufrag

SALT_OCTETS = 16
OVERHEAD_OCTETS = 1 + SALT_OCTETS + 16
"""By so much a seal is longer than its content: octet 0, salt, tag."""

_NONCE = bytes(12)


class Sealer:
    """Seals and opens, for one purpose, under the keys of a key file."""

    def __init__(self, keyring: ufrag.Keyring, purpose: bytes) -> None:
        """`purpose` has no zero octet in it: that ends it."""
        assert purpose and b"\0" not in purpose
        self._keyring = keyring
        self._purpose = purpose

    def seal(self, content: bytes, salt: bytes, context: bytes = b"") -> bytes:
        """`content` under the key that is minted with. `salt` must be random, SALT_OCTETS long."""
        assert len(salt) == SALT_OCTETS
        key = self._keyring.keys[self._keyring.mint_id]
        first = bytes([key.id << 5])
        return first + salt + self._cipher(key, salt).encrypt(_NONCE, content, first + context)

    def open(self, sealed: bytes, context: bytes = b"") -> bytes | None:
        """The content; None if it was altered, is another purpose's, or its key was retired."""
        if len(sealed) < OVERHEAD_OCTETS or sealed[0] & 0x1F:
            return None
        key = self._keyring.keys.get(sealed[0] >> 5)
        if key is None:
            return None
        first, salt, rest = sealed[:1], sealed[1 : 1 + SALT_OCTETS], sealed[1 + SALT_OCTETS :]
        try:
            return self._cipher(key, salt).decrypt(_NONCE, rest, first + context)
        except InvalidTag:
            return None

    def _cipher(self, key: ufrag.Key, salt: bytes) -> AESGCM:
        return AESGCM(hmac.digest(key.sealing, self._purpose + b"\0" + salt, "sha256"))
