"""Builds leaf_cuda._C: the CPU backend always, the CUDA backend if torch is a CUDA build and a toolkit is found.

Environment: TORCH_CUDA_ARCH_LIST (as in torch), CUDA_HOME, FORCE_CUDA=1 (no CUDA is an error), FORCE_CUDA=0 (the CPU
backend only), MAX_JOBS.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# What is compiled for if neither TORCH_CUDA_ARCH_LIST nor a GPU decides, except what the toolkit does not support.
PUBLISHED_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


# The oldest torch it can be built for, and the newest it was tested with. A build works with one minor version of torch
# only, and requires that.
OLDEST_TORCH, TESTED_TORCH = (2, 11), (2, 15)


def sources(*parts):
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    return [f"csrc/{path}" for part, path in rows if part in parts]


def toolkit_of_nvcc():
    """The toolkit that the nvcc on PATH reports. (That nvcc may be a wrapper script outside of the toolkit.)"""
    if not shutil.which("nvcc"):
        return None
    said = subprocess.run(["nvcc", "-v", "no_file"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+?)\s*$", said.stderr, re.MULTILINE)
    return top and Path(top[1]).resolve()


def toolkit_of_torch():
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME


def find_cuda_home():
    """The toolkit: the first of these folders that has both nvcc and the runtime's header."""
    candidates = [
        lambda: os.environ.get("CUDA_HOME"),
        lambda: os.environ.get("CUDA_PATH"),
        toolkit_of_nvcc,
        toolkit_of_torch,  # last: importing cpp_extension settles torch's own choice
    ]
    for candidate in candidates:
        home = candidate()
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return str(home)
    return None


def toolkit_release(cuda_home):
    said = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\d+\.\d+)", said.stdout)[1]


def architectures(torch, cuda_home):
    """In the format of TORCH_CUDA_ARCH_LIST: the user's, else those of the GPUs present, else the published ones."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return listed
    if torch.cuda.is_available():
        present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(present))
    known = subprocess.run([f"{cuda_home}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    kept = [a for a in PUBLISHED_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known.stdout.split()]
    return ";".join(kept) + "+PTX"


def cuda_settings(torch):
    """(CUDA_HOME, architectures); or None for a CPU build, after printing a line that says why."""
    if os.environ.get("FORCE_CUDA") == "0":
        print("leaf_cuda: FORCE_CUDA=0, building the CPU backend only", file=sys.stderr)
        return None
    home = find_cuda_home()
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"
    elif home is None:
        missing = "no CUDA toolkit was found; install one, or set CUDA_HOME to it"
    elif (release := toolkit_release(home)).split(".")[0] != torch.version.cuda.split(".")[0]:
        missing = f"{home} is CUDA {release}, and torch {torch.__version__} of CUDA {torch.version.cuda}; set CUDA_HOME"
    else:
        return home, architectures(torch, home)
    if os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"leaf_cuda: FORCE_CUDA=1, but {missing}")
    print(f"leaf_cuda: building the CPU backend only: {missing}, and rebuild for the CUDA backend", file=sys.stderr)
    return None


def openmp(torch, compiler):
    """Compiler and linker flags for OpenMP, without which at::parallel_for runs on one thread. They link the runtime
    that torch itself uses: another one would not obey torch.set_num_threads."""
    try:
        macros = [*shlex.split(compiler), "-x", "c++", "-dM", "-E", os.devnull]
        is_clang = "__clang__" in subprocess.run(macros, capture_output=True, text=True).stdout
    except OSError as error:
        sys.exit(f"leaf_cuda: the C++ compiler {compiler!r} cannot be run ({error}); install g++, or set CXX")
    if is_clang:  # its code calls LLVM's runtime, but torch's wheels for Linux bring GCC's
        hint = "; CXX=g++ builds them for all" if sys.platform == "linux" else ""
        print(f"leaf_cuda: built by Clang, the CPU kernels run on one thread{hint}", file=sys.stderr)
        return [], []
    bundled = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))
    return ["-fopenmp"], [str(bundled[0])] if bundled else ["-fopenmp"]


def extension_and_command():
    if sys.platform == "win32":
        sys.exit("leaf_cuda: its CPU kernels take GCC or Clang, and torch on Windows another compiler; build it in WSL")
    try:
        import torch
    except ImportError:
        # Enough for an sdist; a build stops here.
        class BuildWithoutTorch(build_ext):
            def run(self):
                sys.exit(
                    "leaf_cuda: torch is not importable in this build environment; install torch and add the flag "
                    "--no-build-isolation: pip install --no-build-isolation ."
                )

        requirement = "torch>={}.{}".format(*OLDEST_TORCH)
        return Extension("leaf_cuda._C", sources("core", "python")), BuildWithoutTorch, requirement

    release = tuple(map(int, torch.__version__.split(".")[:2]))

    settings = cuda_settings(torch)
    if settings:
        os.environ["CUDA_HOME"], os.environ["TORCH_CUDA_ARCH_LIST"] = settings
    from torch.utils import cpp_extension

    standard = "-std=c++20"  # torch before 2.12 would choose C++17
    cxx = [standard, "-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
    cxx += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    if settings:
        listed = settings[1].replace(" ", ";").replace(";", ",")
        extension = cpp_extension.CUDAExtension(
            "leaf_cuda._C",
            sources("core", "cuda", "python"),
            extra_compile_args={
                "cxx": [*cxx, f"-DLEAF_CUDA_ARCHITECTURES={listed}"],
                "nvcc": [standard, "-O3", "-Xcompiler", "-fvisibility=hidden"],
            },
        )
    else:
        extension = cpp_extension.CppExtension(
            "leaf_cuda._C", sources("core", "python"), extra_compile_args={"cxx": cxx}
        )

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # ninja decides what is up to date. Each Python and torch version has a build folder, which is kept between
            # builds (pip would take a temporary one).
            self.force = True
            self.build_temp = str(ROOT / "build" / f"temp-{sys.implementation.cache_tag}-torch-{torch.__version__}")

        def run(self):
            if release < OLDEST_TORCH:
                oldest = ".".join(map(str, OLDEST_TORCH))
                sys.exit(f"leaf_cuda: torch {torch.__version__} is installed; it takes {oldest} or later")
            if release > TESTED_TORCH:
                tested = ".".join(map(str, TESTED_TORCH))
                print(
                    f"leaf_cuda: torch {torch.__version__} is newer than {tested}, the newest tested", file=sys.stderr
                )
            compile_args, extension.extra_link_args = openmp(torch, cpp_extension.get_cxx_compiler())
            extension.extra_compile_args["cxx"] += compile_args
            super().run()
            # What leaf_cuda._ops compares with the running torch before it loads _C.
            built = f"torch = {torch.__version__!r}\ncuda = {torch.version.cuda if settings else None!r}\n"
            Path(self.get_ext_fullpath("leaf_cuda._C")).with_name("_build.py").write_text(built)

    return extension, Build, "torch=={}.{}.*".format(*release)


extension, command, requirement = extension_and_command()
setup(ext_modules=[extension], cmdclass={"build_ext": command}, install_requires=[requirement])
