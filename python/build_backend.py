"""Builds the wheel of the pure module `ckpt` (PEP 517), with the standard library alone."""

import base64
import hashlib
import io
import os
import tarfile
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
NAME, VERSION = "ckpt", "0.1.0"
INFO = f"{NAME}-{VERSION}.dist-info"
METADATA = f"""Metadata-Version: 2.1
Name: {NAME}
Version: {VERSION}
Summary: Checkpoints and rollback of a Python program under libckpt.so (pure ctypes)
License: MIT
Requires-Python: >=3.8
"""
WHEEL = """Wheel-Version: 1.0
Generator: ckpt
Root-Is-Purelib: true
Tag: py3-none-any
"""


def _sources():
    for name in sorted(os.listdir(os.path.join(HERE, NAME))):
        if name.endswith((".py", ".typed")):
            with open(os.path.join(HERE, NAME, name), "rb") as file:
                yield f"{NAME}/{name}", file.read()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    files = dict(_sources())
    files[f"{INFO}/METADATA"] = METADATA.encode()
    files[f"{INFO}/WHEEL"] = WHEEL.encode()
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(content)}\n"
    files[f"{INFO}/RECORD"] = (record + f"{INFO}/RECORD,,\n").encode()
    wheel = f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, wheel), "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def build_sdist(sdist_directory, config_settings=None):
    sdist = f"{NAME}-{VERSION}.tar.gz"
    files = dict(_sources())
    for name in ("pyproject.toml", "build_backend.py"):
        with open(os.path.join(HERE, name), "rb") as file:
            files[name] = file.read()
    files["PKG-INFO"] = METADATA.encode()
    with tarfile.open(os.path.join(sdist_directory, sdist), "w:gz") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(f"{NAME}-{VERSION}/{path}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return sdist
