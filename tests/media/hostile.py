"""Photos made to be costly, small as files."""

import struct


def many_scans(side_px: int, scans: int) -> bytes:
    """A grey progressive JPEG of flat pixels: after its DC scan, so many scans that say nothing of every block.

    9999 pixels and 500 scans are 266 KB, and 6 s of a fast core, 37 s of a shared one.
    """

    def segment(code: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body

    def scan(first: int, last: int, bits: str) -> bytes:
        data = int(bits + "1" * (-len(bits) % 8), 2).to_bytes((len(bits) + 7) // 8)
        return segment(0xDA, bytes([1, 1, 0, first, last, 0])) + data.replace(b"\xff", b"\xff\x00")

    def one_symbol(table: int, symbol: int) -> bytes:
        return segment(0xC4, bytes([table, 1, *[0] * 15, symbol]))  # its code is a single 0

    blocks = ((side_px + 7) // 8) ** 2
    start = b"\xff\xd8" + segment(0xDB, bytes([0, *[1] * 64]))
    start += segment(0xC2, struct.pack(">BHHB", 8, side_px, side_px, 1) + bytes([1, 0x11, 0]))
    start += one_symbol(0x00, 0) + one_symbol(0x10, 0xE0)  # DC: no change; AC: 16,384 empty blocks and a 14-bit number
    runs, rest = divmod(blocks, 32767)
    empty = scan(1, 63, ("0" + "1" * 14) * (runs + bool(rest)))
    return start + scan(0, 0, "0" * blocks) + empty * (scans - 1) + b"\xff\xd9"
