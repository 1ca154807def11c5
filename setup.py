"""The compiled CPU kernels and the README without its links into the repository; all else is in
pyproject.toml.

Where there is no C++ compiler, or another processor, they are left out, and PyTorch's operators do
the work. ``RAPID_LLM_PURE=1`` in the environment leaves them out of the wheel, which then fits
every platform.
"""

import os
import re
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

TARGETS = {
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-Wno-maybe-uninitialized"],
    "avx2": ["-march=x86-64-v3"],
}
FOLDER = "rapid_llm/engine/cpu"
# They are loaded by ctypes and use nothing of Python, so that one wheel serves every version.
# Free-threaded builds of Python have no stable ABI.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

kernels = [
    Extension(
        f"rapid_llm.engine.cpu._kernels_{name}",
        sources=[f"{FOLDER}/kernels.cpp"],
        depends=[f"{FOLDER}/{header}.h" for header in ("attention", "batch", "linear", "vectors")],
        extra_compile_args=["-std=c++17", "-O3", "-fopenmp", *flags],
        extra_link_args=["-fopenmp"],
        optional=True,
        py_limited_api=STABLE,
    )
    for name, flags in TARGETS.items()
]


def standing_alone(readme: str) -> str:
    """The README where its repository is not: no pictures, and names in the place of links."""
    text = re.sub(r"^!\[[^\]]*\]\((?!https:)[^)]*\)\n\n", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https:)([^)]*)\)", r"\1 (`\2`)", text)


if __name__ == "__main__":
    setup(
        long_description=standing_alone(Path("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
        ext_modules=[] if os.environ.get("RAPID_LLM_PURE") == "1" else kernels,
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE else {},
    )
