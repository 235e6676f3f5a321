"""Files that the Hub's client downloaded are compared with their digests."""

import hashlib
import os

import pytest

from dpo_jax.system import downloads
from tests import faults

CONTENT = b"weights " * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GIT_SHA1 = hashlib.sha1(b"blob 800\0" + CONTENT).hexdigest()


def in_cache(folder, digest):
  """Writes a file as the cache of the Hub holds it."""
  blob = folder / "blobs" / digest
  blob.parent.mkdir()
  blob.write_bytes(CONTENT)
  path = folder / "snapshots" / "model.safetensors"
  path.parent.mkdir()
  path.symlink_to(blob)
  return path


def in_folder(folder, digest):
  """Writes a file as `hf download --local-dir` does."""
  path = folder / "model.safetensors"
  path.write_bytes(CONTENT)
  metadata = folder / ".cache/huggingface/download/model.safetensors.metadata"
  metadata.parent.mkdir(parents=True)
  time = os.path.getmtime(path)
  metadata.write_text(f"{'0' * 40}\n{digest}\n{time}\n")
  return path


@pytest.mark.parametrize("digest", [SHA256, GIT_SHA1])
@pytest.mark.parametrize("write", [in_cache, in_folder])
def test_damage_to_a_download_is_named(tmp_path, write, digest):
  path = write(tmp_path, digest)
  downloads.verify([path])
  time = os.path.getmtime(path)
  faults.flip_byte(path)
  os.utime(path, (time, time))  # a disk's fault leaves the time
  with pytest.raises(ValueError, match=f"{path} is damaged: .*{digest[:12]}"):
    downloads.verify([path])


def test_a_file_that_was_changed_after_its_download_is_the_users_own(tmp_path):
  path = in_folder(tmp_path, SHA256)
  path.write_bytes(b"fine-tuned")
  later = os.path.getmtime(path) + 10
  os.utime(path, (later, later))
  downloads.verify([path])


@pytest.mark.parametrize("metadata", ["", "no digest", "0\n1\n2\n"])
def test_files_without_a_digest_are_not_compared(tmp_path, metadata):
  path = in_folder(tmp_path, SHA256)
  path.write_bytes(b"other")
  folder = tmp_path / ".cache/huggingface/download"
  (folder / "model.safetensors.metadata").write_text(metadata)
  downloads.verify([path, "gs://bucket/model.safetensors"])
