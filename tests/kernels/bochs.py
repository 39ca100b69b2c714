"""Static programs on an emulated PC: Bochs implements AVX-512, which qemu does not.

The PC starts Linux, the kernel of a Debian package, with the programs in its initial file system; their
output comes back through a serial port.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

# Bochs announces some features in a way that Linux cannot use: the state of protection keys (515), compacted
# saving of registers (321, 323), short moves without long ones (580), tiles with a state that is always there
# (600).
KERNEL_OPTIONS = (
    "clearcpuid=515,321,323,580,600 no5lvl lpj=1000000 tsc=reliable no_timer_check mitigations=off"
)

GRUB = "/usr/lib/grub/i386-pc"

MENU = f"""
linux /boot/vmlinuz console=ttyS0 quiet panic=-1 {KERNEL_OPTIONS}
initrd /boot/initrd
boot
"""

MACHINE = """
config_interface: textconfig
display_library: rfb, options="timeout=0"
cpu: model={processor}, ips=50000000, reset_on_triple_fault=0
megs: 256
clock: sync=none
ata0-master: type=cdrom, path=disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
log: bochs.txt
panic: action=fatal
"""


def kernel() -> Path | None:
    """BITNET_KERNELS_LINUX, or else a kernel of /boot; None where there is none to read."""
    named = os.environ.get("BITNET_KERNELS_LINUX")
    found = [Path(named)] if named else sorted(Path("/boot").glob("vmlinuz-*"))
    return next((path for path in reversed(found) if os.access(path, os.R_OK)), None)


def obstacle(processor: str) -> str | None:
    """Why no PC with this processor, a name of `bochs --help cpu`, can be emulated here."""
    missing = [name for name in ("bochs", "grub-mkrescue", "xorriso") if shutil.which(name) is None]
    missing += [] if Path(GRUB).is_dir() else ["GRUB for PCs"]
    missing += [] if kernel() else ["Linux kernel (in /boot, or named by BITNET_KERNELS_LINUX)"]
    if missing:
        packages = "bochs grub-pc-bin xorriso linux-image-cloud-amd64"
        return f"no {', '.join(missing)} (Debian: apt install {packages})"
    listed = subprocess.run(["bochs", "--help", "cpu"], capture_output=True, text=True, timeout=60)
    known = processor in (listed.stdout + listed.stderr).split()
    return None if known else f"bochs does not know the processor {processor}; a newer one may"


def archive(files: dict[str, bytes]) -> bytes:
    """Executable files by path, with their folders before them, as a cpio archive in the format newc."""
    content = b""
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")]):
        mode = 0o100755 if data else 0o40755
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        for part in (header, data):
            content += part + bytes(-len(part) % 4)
    return content


def run(
    programs: list[Path], init: Path, processor: str, folder: Path, timeout: float
) -> dict[str, tuple[int, str]]:
    """Exit status and output of every program.

    init is init.cc, compiled; folder takes the files of the machine.
    A RuntimeError has what the machine printed if not all programs came to an end.
    """
    boot = folder / "disc" / "boot"
    (boot / "grub").mkdir(parents=True)
    (boot / "grub" / "grub.cfg").write_text(MENU)
    shutil.copyfile(str(kernel()), boot / "vmlinuz")
    files = {f"programs/{program.name}": program.read_bytes() for program in programs}
    (boot / "initrd").write_bytes(archive({"init": init.read_bytes(), "programs": b"", **files}))
    build = ["grub-mkrescue", "-d", GRUB, "-o", str(folder / "disc.iso"), str(folder / "disc")]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (folder / "machine.txt").write_text(MACHINE.format(processor=processor))
    # Debian's Bochs has a debugger, which waits for a command. It ends with status 1 when the PC switches off.
    emulator = ["bochs", "-q", "-f", "machine.txt"]
    subprocess.run(emulator, cwd=folder, input=b"continue\n", capture_output=True, timeout=timeout)
    printed = (folder / "serial.txt").read_text(errors="replace").replace("\r", "")
    results = re.findall(r"^begin (.*)\n((?:.*\n)*?)end \1 (\d+)$", printed, re.MULTILINE)
    if [name for name, _, _ in results] != sorted(program.name for program in programs):
        raise RuntimeError(f"the emulated machine stopped early; see {folder}/bochs.txt:\n{printed[-3000:]}")
    return {name: (int(status), output) for name, output, status in results}
