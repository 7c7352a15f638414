"""A signed folder: what verifies, what does not, and what is named then."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.errors import InputError
from argonne.layout import SIGNATURE
from argonne.publish.signature import sign, verify


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_key(folder: Path, name: str = "key", curve: str = "prime256v1") -> Path:
    key = folder / name
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", key)
    openssl("ec", "-in", key, "-pubout", "-out", public_of(key))
    return key


def public_of(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path)


@pytest.fixture
def signed(key: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 300)
    (folder / "README.md").write_text("A card.")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    assert sign(folder, key) == folder / SIGNATURE
    return folder


def listed(folder: Path) -> dict[str, str]:
    """Files and hashes that the signature names."""
    payload = json.loads((folder / SIGNATURE).read_text())["dsseEnvelope"]["payload"]
    return {item["name"]: item["digest"] for item in json.loads(base64.b64decode(payload))["predicate"]["resources"]}


def test_a_sound_signature_covers_every_file_and_verifies(signed: Path, key: Path) -> None:
    assert sorted(listed(signed)) == ["README.md", "model.safetensors", "tokenizer/tokenizer.json"]
    assert verify(signed, public_of(key)) == []


@pytest.mark.parametrize("curve", ["secp384r1", "secp521r1"])
def test_larger_curves_sign_too(curve: str, signed: Path, tmp_path: Path, key: Path) -> None:
    larger = make_key(tmp_path, "larger", curve)
    sign(signed, larger)
    assert verify(signed, public_of(larger)) == []
    assert verify(signed, public_of(key)) != []


def test_a_folder_may_move_be_a_git_repository_and_be_downloaded_by_the_hub(signed: Path, key: Path) -> None:
    moved = signed.rename(signed.with_name("moved"))
    for name in (".git/HEAD", ".cache/huggingface/download/README.md.metadata", ".gitattributes"):
        (moved / name).parent.mkdir(parents=True, exist_ok=True)
        (moved / name).write_text("of another tool")
    assert verify(moved, public_of(key)) == []


def test_links_to_files_verify_as_the_cache_of_the_hub_keeps_them(signed: Path, key: Path, tmp_path: Path) -> None:
    blobs = signed.rename(tmp_path / "blobs")
    signed.mkdir()
    for path in blobs.rglob("*"):
        if path.is_file():
            (signed / path.relative_to(blobs)).parent.mkdir(exist_ok=True)
            (signed / path.relative_to(blobs)).symlink_to(path)
    assert verify(signed, public_of(key)) == []
    (blobs / "README.md").write_text("Another.")
    assert verify(signed, public_of(key)) == [f"{signed / 'README.md'}: has other bytes than were signed"]


def test_a_linked_folder_which_nobody_hashes_is_named(signed: Path, key: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (signed / "more").symlink_to(tmp_path / "elsewhere")
    assert verify(signed, public_of(key)) == [f"{signed / 'more'}: is a link to a folder, which no signature covers"]


def test_a_changed_weight_is_named(signed: Path, key: Path) -> None:
    weights = signed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[500] ^= 1
    weights.write_bytes(content)
    assert verify(signed, public_of(key)) == [f"{weights}: has other bytes than were signed"]


def test_a_swapped_card_an_added_and_a_removed_file_are_named(signed: Path, key: Path) -> None:
    (signed / "README.md").write_text("B card.")
    (signed / "tokenizer" / "added.py").write_text("")
    (signed / "model.safetensors").unlink()
    assert verify(signed, public_of(key)) == [
        f"{signed / 'model.safetensors'}: is missing, and was signed",
        f"{signed / 'tokenizer' / 'added.py'}: was added after the signature",
        f"{signed / 'README.md'}: has other bytes than were signed",
    ]


def test_a_list_that_was_edited_after_it_was_signed_is_a_forgery(signed: Path, key: Path) -> None:
    """The card is swapped, and its hash in the list with it: without the key that is no signature."""
    bundle = json.loads((signed / SIGNATURE).read_text())
    before = listed(signed)["README.md"]
    (signed / "README.md").write_text("Another card.")
    sign(other := shutil.copytree(signed, signed.with_name("other")), key)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).decode()
    forged = payload.replace(before, listed(other)["README.md"])
    assert forged != payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(forged.encode()).decode()
    (signed / SIGNATURE).write_text(json.dumps(bundle))
    (problem,) = verify(signed, public_of(key))
    assert problem.startswith(f"{signed / SIGNATURE}: is not what {public_of(key)} belongs to, or was changed")


def test_the_signature_of_another_key_is_none(signed: Path, key: Path, tmp_path: Path) -> None:
    sign(signed, make_key(tmp_path, "theirs"))
    (problem,) = verify(signed, public_of(key))
    assert problem.startswith(f"{signed / SIGNATURE}: is not what {public_of(key)} belongs to")


def test_another_key_that_is_said_to_be_ours_is_none(signed: Path, key: Path, tmp_path: Path) -> None:
    """The name of the key in the bundle is no proof of it."""
    ours = json.loads((signed / SIGNATURE).read_text())["verificationMaterial"]
    sign(signed, make_key(tmp_path, "theirs"))
    bundle = json.loads((signed / SIGNATURE).read_text())
    (signed / SIGNATURE).write_text(json.dumps({**bundle, "verificationMaterial": ours}))
    (problem,) = verify(signed, public_of(key))
    assert "InvalidSignature" in problem


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"verificationMaterial": {}, "dsseEnvelope": null}'])
def test_a_file_that_is_no_signature_does_not_verify(content: bytes, signed: Path, key: Path) -> None:
    (signed / SIGNATURE).write_bytes(content)
    (problem,) = verify(signed, public_of(key))
    assert str(signed / SIGNATURE) in problem


def test_a_folder_without_a_signature_is_wrong_input(signed: Path, key: Path) -> None:
    (signed / SIGNATURE).unlink()
    with pytest.raises(InputError, match=r"model\.sig: no such file: the folder was not signed"):
        verify(signed, public_of(key))


def test_a_link_is_not_signed(signed: Path, key: Path) -> None:
    (signed / "more").symlink_to(signed / "README.md")
    with pytest.raises(InputError, match="more: is a link"):
        sign(signed, key)


def test_keys_that_cannot_sign_are_named_with_what_is_wrong(signed: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: cannot be read \(No such file"):
        sign(signed, tmp_path / "none")
    with pytest.raises(InputError, match=r"key\.pub: is no private key in PEM; `openssl ecparam"):
        sign(signed, public_of(key))
    openssl("ec", "-in", key, "-aes256", "-passout", "pass:secret", "-out", tmp_path / "locked")
    with pytest.raises(InputError, match="locked: is protected by a passphrase"):
        sign(signed, tmp_path / "locked")
    openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "ed")
    with pytest.raises(InputError, match=r"ed: is a key of Ed25519.*, expected one of P-256"):
        sign(signed, tmp_path / "ed")
    with pytest.raises(InputError, match="secp256k1, expected one of P-256, P-384, P-521"):
        sign(signed, make_key(tmp_path, "coin", "secp256k1"))


def test_keys_that_cannot_verify_are_named_with_what_is_wrong(signed: Path, key: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"key: is no public key in PEM; `openssl ec -in KEY -pubout"):
        verify(signed, key)
    with pytest.raises(InputError, match=r"none\.pub: cannot be read"):
        verify(signed, tmp_path / "none.pub")


def test_without_the_library_the_line_that_installs_it_is_told(
    signed: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for work in (lambda: sign(signed, key), lambda: verify(signed, public_of(key))):
        with pytest.raises(InputError, match=r"pip install 'argonne\[sign\]'"):
            work()


WITHOUT_NETWORK = """
import sys
from pathlib import Path

def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
from argonne.publish.signature import sign, verify
sign(Path(sys.argv[1]), Path(sys.argv[2]))
assert verify(Path(sys.argv[1]), Path(sys.argv[3])) == []
if len(sys.argv) > 4:
    import socket
    socket.create_connection(("127.0.0.1", 9))
print("verified")
"""


def test_neither_side_asks_the_network(signed: Path, key: Path) -> None:
    """In a fresh process, so that importing is seen too. urllib3 makes a socket when imported, and gives it no
    address.
    """
    command = [sys.executable, "-c", WITHOUT_NETWORK, str(signed), str(key), str(public_of(key))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("verified\n", 0), done.stderr
    asking = subprocess.run([*command, "ask"], capture_output=True, text=True, check=False)
    assert "socket." in asking.stderr
    assert asking.stdout == ""


def test_inspect_checks_a_signature(
    key: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tokens / "tokenizer", tmp_path / "tokenizer")
    sign(folder, key)
    words = ["inspect", str(folder), "--public-key", str(public_of(key))]
    assert main(words) == 0
    assert f"signature: verified by {public_of(key)}" in capsys.readouterr().out
    (folder / "added.txt").write_text("")
    assert main([*words, "--json"]) == 2
    said = capsys.readouterr()
    assert "added.txt: was added after the signature" in json.loads(said.out)["problems"][0]
    assert json.loads(said.out)["signature"] == f"not that of {public_of(key)}"
    assert "does not verify" in said.err
