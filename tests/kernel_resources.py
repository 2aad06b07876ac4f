"""What the compiler made of the CUDA kernels: a table of each kernel's resources and instructions, and the rules.

    python tests/kernel_resources.py [object or library]     (default: the installed leaf_cuda._C)

Needs cuobjdump and nvdisasm: of the CUDA toolkit, of the packages nvidia-cuda-cuobjdump and nvidia-nvdisasm, or of
Triton, which comes with CUDA builds of torch. Exits with 1 if a kernel breaks a rule.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# With 128 registers, two blocks of 256 threads fit a multiprocessor, which has 65,536; only one fits where a thread has
# an LSTM's twenty sums and twenty parameters in float64.
MAX_REGISTERS = 128
MAX_REGISTERS_OF = {"LstmBackward, double": 255}


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    opcodes: Counter = field(default_factory=Counter)
    code: list[tuple[int, str, int | None]] = field(default_factory=list)  # address, opcode, a branch's target

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))

    def broken_rules(self) -> list[str]:
        broken = []
        most = next((n for name, n in MAX_REGISTERS_OF.items() if name in self.name), MAX_REGISTERS)
        if self.registers > most:
            broken.append(f"more than {most} registers")
        if self.stack or self.local or self.count(r"LDL|STL"):
            broken.append("local memory")
        if self.count(r"(RED|REDG|ATOM|ATOMG|ATOMS)\b.*(F16|F32|F64|BF16|CAST\.SPIN)"):
            broken.append("floating-point atomics")
        if self.is_vectorised and not (self.count(r"LDG\.E.*\.128") and self.count(r"STG\.E.*\.128")):
            broken.append("no 128-bit loads or stores")
        moves = [[opcode for opcode in body if re.match("LDG|STG", opcode)] for body in self.loops()]
        of_vectors = [opcodes for opcodes in moves if any(".128" in opcode for opcode in opcodes)]
        whole = [all(".128" in opcode for opcode in opcodes) for opcodes in of_vectors]
        if self.name.startswith(
            "rows"
        ):  # these have a loop for whole vectors alone, and one with the elements at rows' ends
            whole = [any(w and len({o[:3] for o in opcodes}) == 2 for w, opcodes in zip(whole, of_vectors))]
        if self.is_vectorised and not all(whole):
            broken.append("divided loads or stores in a loop over vectors")
        return broken

    def loops(self) -> list[list[str]]:
        """The instructions of each loop, without those of loops inside."""
        loops = {(target, end) for end, _, target in self.code if target is not None and target < end}
        inside = {loop: [i for i in loops if loop[0] <= i[0] and i[1] <= loop[1] and i != loop] for loop in loops}
        return [
            [
                opcode
                for address, opcode, _ in self.code
                if begin <= address <= end and not any(b <= address <= e for b, e in inside[begin, end])
            ]
            for begin, end in loops
        ]

    def shortest_loop(self, *patterns: str) -> int:
        """Instructions of the shortest loop that has an opcode for each of the patterns."""
        matching = (b for b in self.loops() if all(any(re.match(p, opcode) for opcode in b) for p in patterns))
        return min(map(len, matching), default=0)

    @property
    def loop(self) -> int:
        """Instructions of the loop that loads from and stores to global memory, by vectors if the kernel has any."""
        load, store = (rf"{kind}\.E.*\.128" if self.is_vectorised else kind for kind in ("LDG", "STG"))
        return self.shortest_loop(load, store)

    @property
    def ends(self) -> int:
        """Instructions of the loop over rows that begin or end within a vector, which stores vectors and single
        elements."""
        return self.shortest_loop(r"STG\.E.*\.128", r"STG\.E(?!.*\.128)") if self.name.startswith("rows") else 0

    @property
    def is_vectorised(self) -> bool:
        """Kernels of one element at a time are <S, 1, Unroll>."""
        return "finish" not in self.name and ", 1," not in self.name


def find_tool(name: str) -> str:
    found = [shutil.which(name)]
    if home := os.environ.get("CUDA_HOME"):
        found.append(shutil.which(name, path=f"{home}/bin"))
    for package in ("triton", "nvidia"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations if spec else ():
            found += [str(p) for p in Path(folder).rglob(name) if os.access(p, os.X_OK) and p.is_file()]
    tool = next(filter(None, found), None)
    if tool is None:
        sys.exit(f"kernel_resources: {name} is not here: pip install nvidia-cuda-cuobjdump nvidia-nvdisasm")
    return tool


def dump(binary: str, *flags: str) -> str:
    cuobjdump = find_tool("cuobjdump")
    path = os.pathsep.join([str(Path(find_tool("nvdisasm")).parent), os.environ["PATH"]])
    run = subprocess.run(
        [cuobjdump, *flags, binary], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    return run.stdout


def short_name(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    match = re.search(r"(\w+)<(.*?)>\(", name)
    if not match:
        return name
    arguments = re.sub(r"\(int\)|c10::", "", match[2])
    return f"{match[1]}<{arguments}>"


def kernels(binary: str) -> list[Kernel]:
    by_key: dict[tuple[str, str], Kernel] = {}
    architecture = kernel = None
    for line in dump(binary, "--dump-sass").splitlines():
        if match := re.match(r"\s*code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = by_key.setdefault((architecture, match[1]), Kernel(short_name(match[1]), architecture))
        elif kernel and (match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            kernel.opcodes[match[2]] += 1
            target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line.split(";")[0])
            kernel.code.append((int(match[1], 16), match[2], int(target[1], 16) if target else None))
    for line in dump(binary, "--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line) or re.match(r"\s*code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = by_key.get((architecture, match[1]))
        elif kernel and (match := re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", line)):
            kernel.registers, kernel.stack, kernel.local = map(int, match.groups())
    return sorted(by_key.values(), key=lambda k: (k.architecture, k.name))


def main() -> int:
    if len(sys.argv) > 1:
        binary = sys.argv[1]
    else:
        import leaf_cuda

        binary = leaf_cuda._ops._C.__file__
    found = kernels(binary)
    if not found:
        print(f"kernel_resources: {binary} holds no CUDA kernels")
        return 1
    print(
        f"{'kernel':42} {'arch':6} {'regs':>4} {'stack':>5} {'instr':>6} {'loop':>5} {'ends':>5} {'LDG128':>6} {'STG128':>6} "
        f"{'MUFU':>5}  rules"
    )
    for k in found:
        counts = [sum(k.opcodes.values()), k.count(r"LDG\.E.*\.128"), k.count(r"STG\.E.*\.128"), k.count(r"MUFU")]
        rules = "; ".join(k.broken_rules()) or "kept"
        print(
            f"{k.name:42} {k.architecture:6} {k.registers:4} {k.stack:5} {counts[0]:6} {k.loop:5} {k.ends or '–':>5} {counts[1]:6} "
            f"{counts[2]:6} {counts[3]:5}  {rules}"
        )
    broken = sum(bool(k.broken_rules()) for k in found)
    unread = sum(k.registers == 0 for k in found)
    print(f"{len(found)} kernels, {broken} break a rule, {unread} without a resource report")
    return 1 if broken or unread else 0


if __name__ == "__main__":
    sys.exit(main())
