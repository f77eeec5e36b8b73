"""How does the cost of a step grow? Draws docs/steady_decode.svg from the results of bench_steady_decode.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

from harness import RESULTS

TARGET = Path(__file__).parents[1] / "docs" / "steady_decode.svg"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 64, 48, 40, 16
X_TICKS, Y_TICKS = (64, 256, 1024, 4096), (10, 100, 1_000, 10_000, 100_000)


def place(running: float, cost_us: float) -> tuple[float, float]:
    """Pixel of a point on the two logarithmic axes."""
    x = math.log(running / X_TICKS[0]) / math.log(X_TICKS[-1] / X_TICKS[0])
    y = math.log(cost_us / Y_TICKS[0]) / math.log(Y_TICKS[-1] / Y_TICKS[0])
    return LEFT + 16 + x * (WIDTH - LEFT - RIGHT - 32), HEIGHT - BOTTOM - y * (HEIGHT - BOTTOM - TOP)


def line(points: list[tuple[int, float]], color: str, label: str) -> str:
    """A curve with its points and a label at its end."""
    pixels = [place(*point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in pixels)
    x, y = pixels[-1]
    text = f'<text x="{x - 6:.1f}" y="{y - 10:.1f}" text-anchor="end" fill="{color}">{label}</text>'
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>{dots}{text}'


def main() -> None:
    rows = json.loads((RESULTS / "steady_decode.json").read_text())["rows"]
    plain = [row for row in rows if "packed" not in row["what"]]
    ours = [(int(row["what"].split()[0]), row["median"]) for row in plain]
    peer = [(int(row["what"].split()[0]), row["peer_vllm_us"]) for row in plain if "peer_vllm_us" in row]
    grid = ""
    for tick in X_TICKS:
        x, _ = place(tick, Y_TICKS[0])
        grid += f'<text x="{x:.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,}</text>'
    for tick in Y_TICKS:
        _, y = place(X_TICKS[0], tick)
        label = f"{tick:,} µs" if tick < 1000 else f"{tick // 1000} ms"
        grid += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>'
        grid += f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{label}</text>'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'font-size="12" fill="#444"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="22" font-size="14" fill="#111">CPU time of one decode step, schedule + update</text>{grid}'
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">running requests (both axes logarithmic)</text>'
        f"{line(peer, '#b4552d', 'vLLM 0.33, v1 core (another machine, see docs/peers.md)')}"
        f"{line(ours, '#1f5fa8', 'pagedkv')}</svg>\n"
    )
    TARGET.write_text(svg)
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
