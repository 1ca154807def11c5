"""The compiled CPU kernels; all else is in pyproject.toml.

Where there is no C++ compiler, or another processor, they are left out, and PyTorch's operators do
the work. ``RAPID_LLM_PURE=1`` in the environment leaves them out of the wheel, which then fits
every platform.
"""

import os
import sysconfig

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
        depends=[f"{FOLDER}/{header}.h" for header in ("attention", "linear", "vectors")],
        extra_compile_args=["-std=c++17", "-O3", "-fopenmp", *flags],
        extra_link_args=["-fopenmp"],
        optional=True,
        py_limited_api=STABLE,
    )
    for name, flags in TARGETS.items()
]
setup(
    ext_modules=[] if os.environ.get("RAPID_LLM_PURE") == "1" else kernels,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE else {},
)
