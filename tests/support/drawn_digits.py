"""The ten digits as strokes of a pen: lists of points (x, y) from 0 to 1."""

import math


Point = tuple[float, float]


def arc(x: float, y: float, width: float, height: float, start: float, end: float) -> list[Point]:
    """Part of an ellipse with its middle at (x, y), from one angle to another, in degrees clockwise from the right."""
    angles = [math.radians(start + (end - start) * step / 10) for step in range(11)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


DIGITS: dict[str, list[list[Point]]] = {
    "0": [arc(0.5, 0.5, 0.22, 0.35, -90, 270)],
    "1": [[(0.4, 0.3), (0.54, 0.15), (0.54, 0.85)]],
    "2": [[*arc(0.5, 0.33, 0.2, 0.18, -170, 45), (0.3, 0.85), (0.72, 0.85)]],
    "3": [[*arc(0.48, 0.32, 0.19, 0.17, -150, 90), *arc(0.48, 0.67, 0.22, 0.18, -90, 150)]],
    "4": [[(0.5, 0.15), (0.28, 0.58), (0.75, 0.58)], [(0.62, 0.38), (0.6, 0.88)]],
    "5": [[(0.7, 0.15), (0.38, 0.15), (0.34, 0.45), *arc(0.48, 0.64, 0.21, 0.21, -110, 140)]],
    "6": [[(0.6, 0.14), (0.42, 0.35), (0.33, 0.6), *arc(0.5, 0.67, 0.17, 0.18, 180, -180)]],
    "7": [[(0.3, 0.16), (0.72, 0.16), (0.45, 0.86)], [(0.38, 0.5), (0.68, 0.5)]],
    "8": [[*arc(0.5, 0.32, 0.17, 0.17, 90, -270), *arc(0.5, 0.68, 0.2, 0.18, -90, 270)]],
    "9": [[*arc(0.5, 0.34, 0.17, 0.19, 0, -360), (0.66, 0.5), (0.58, 0.86)]],
}
