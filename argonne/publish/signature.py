"""A signed list of the files of a folder, by OpenSSF model signing with an elliptic key: who holds the key vouches for
every byte. Nothing is asked over the network.

The format is a Sigstore bundle (https://docs.sigstore.dev/about/bundle/) around an in-toto statement that names each
file with its sha256; `model_signing verify key` of that project reads it too.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from argonne.errors import InputError, first_line
from argonne.files import sha256_of_file, write_bytes
from argonne.layout import SIGNATURE

CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
# What git and the Hub's client keep beside the files: it changes with every push and download, and nothing loads it.
LEFT_OUT = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore", ".cache/huggingface")
MAKE_KEY = "`openssl ecparam -name prime256v1 -genkey -noout -out FILE` makes one"
MAKE_PUBLIC = "`openssl ec -in KEY -pubout -out KEY.pub` writes it"


def sign(folder: Path, key: Path) -> Path:
    """Write `model.sig` over every file of `folder` but LEFT_OUT, in place of an earlier signature, and return where it
    is.

    key: an elliptic private key in PEM, without a passphrase. Raises InputError for another key, or a folder that
    cannot be signed.
    """
    library = _library()
    _check_private_key(key)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that is to be signed")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InputError(
                f"{path}: is a link, and what it leads to may change; put the file itself there, then sign"
            )
    config = library.signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(_hashing(library))
    with TemporaryDirectory() as temporary:
        config.sign(folder.resolve(), Path(temporary) / SIGNATURE)
        write_bytes(folder / SIGNATURE, (Path(temporary) / SIGNATURE).read_bytes())
    return folder / SIGNATURE


def verify(folder: Path, public_key: Path) -> list[str]:
    """One line for each thing that is not as it was signed: the signature itself, a file with other bytes, one that is
    missing, one that was added. None: whoever holds the private key signed exactly these files.

    public_key: in PEM. Raises InputError for a key that is none, and for a folder without a signature.
    """
    library, signature = _library(), folder / SIGNATURE
    _check_public_key(public_key)
    if not signature.is_file():
        raise InputError(f"{signature}: no such file: the folder was not signed, or lost its signature")
    # A folder of the Hub's cache is made of links to files. Linked folders are not looked into, by nobody.
    hashing = _hashing(library).set_allow_symlinks(True)
    config = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(hashing)
    unseen = [
        f"{path}: is a link to a folder, which no signature covers"
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() and path.is_dir()
    ]
    try:
        config.verify(folder, signature)
    except Exception as error:  # whatever a forged file makes of the library: it does not verify
        words = f"{type(error).__name__}: {first_line(error)}"
        if not hashing.reached:
            return [f"{signature}: is not what {public_key} belongs to, or was changed ({words})"]
        return [*_differing(folder, signature), *unseen] or [f"{signature}: does not verify ({words})"]
    return unseen


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise InputError(
            f"signatures need an extra that is not here, or not all of it ({error}): pip install 'argonne[sign]'"
        ) from None
    return model_signing


def _hashing(library: Any) -> Any:
    """How the files are hashed, each by sha256. `reached`: the library hashes only once it has found the signature to
    be that of the key, so that a forged list is told from changed files.
    """

    class Hashing(library.hashing.Config):
        reached = False

        def hash(self, *given: Any, **more: Any) -> Any:
            self.reached = True
            return super().hash(*given, **more)

    return Hashing().set_ignored_paths(paths=LEFT_OUT)


def _differing(folder: Path, signature: Path) -> list[str]:
    """The files that are not as an authentic signature lists them."""
    payload = json.loads(base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"]))
    signed = {item["name"]: item["digest"] for item in payload["predicate"]["resources"]}
    left_out = [folder / name for name in LEFT_OUT]
    here = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not any(path.is_relative_to(other) for other in left_out)
    }
    lines = [f"{folder / name}: is missing, and was signed" for name in sorted(signed.keys() - here.keys())]
    lines += [f"{here[name]}: was added after the signature" for name in sorted(here.keys() - signed.keys())]
    changed = sorted(name for name in here.keys() & signed.keys() if sha256_of_file(here[name]) != signed[name])
    return lines + [f"{here[name]}: has other bytes than were signed" for name in changed]


def _check_private_key(key: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(_read(key, MAKE_KEY), None)
    except TypeError:
        raise InputError(
            f"{key}: is protected by a passphrase, which nobody is there to type; give a key without one "
            "(`openssl pkey -in KEY -out FILE`), in a file that only you can read"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{key}: is no private key in PEM; {MAKE_KEY}") from None
    _check_curve(key, found.public_key(), MAKE_KEY)


def _check_public_key(key: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(_read(key, MAKE_PUBLIC))
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{key}: is no public key in PEM; {MAKE_PUBLIC}") from None
    _check_curve(key, found, "give the public key that belongs to the signature")


def _check_curve(key: Path, public: Any, advice: str) -> None:
    curve = getattr(getattr(public, "curve", None), "name", type(public).__name__)
    if curve not in CURVES:
        raise InputError(f"{key}: is a key of {curve}, expected one of {', '.join(CURVES.values())}; {advice}")


def _read(key: Path, advice: str) -> bytes:
    try:
        return key.read_bytes()
    except OSError as error:
        raise InputError(f"{key}: cannot be read ({error.strerror}); {advice}") from None
