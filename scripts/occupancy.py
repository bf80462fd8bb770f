"""How many blocks of a kernel a multiprocessor holds at once, from what ptxas says that the kernel
needs: NVIDIA's occupancy rules, for the architectures that we compile for.
"""

from dataclasses import dataclass

REGISTERS, REGISTER_UNIT, PARTITIONS = (
    64 << 10,
    256,
    4,
)  # a multiprocessor's; a warp's come in units


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor, from the CUDA C++ programming guide's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_of_a_block: int
    shared_unit: int
    reserved: int  # bytes of shared memory that each block costs beside its own


LIMITS = {
    75: Limits(32, 16, 64 << 10, 64 << 10, 256, 0),
    80: Limits(64, 32, 164 << 10, 163 << 10, 128, 1 << 10),
    86: Limits(48, 16, 100 << 10, 99 << 10, 128, 1 << 10),
    90: Limits(64, 32, 228 << 10, 227 << 10, 128, 1 << 10),
}


def resident_blocks(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of `threads`, with so many registers for each and bytes of shared memory, that a
    multiprocessor runs at once; 0 if not even one fits.
    """
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    of_warp = _round_up(32 * registers, REGISTER_UNIT)
    if of_warp * _round_up(warps, PARTITIONS) > REGISTERS or shared > limits.shared_of_a_block:
        return 0
    of_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    of_block = _round_up(shared + limits.reserved, limits.shared_unit)
    of_shared = limits.shared // of_block if of_block else limits.blocks
    return min(limits.blocks, limits.warps // warps, of_registers, of_shared)


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> float:
    """Resident warps as a part of the most there can be."""
    blocks = resident_blocks(architecture, threads, registers, shared)
    return blocks * -(-threads // 32) / LIMITS[architecture].warps


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
