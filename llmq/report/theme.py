"""The colours of a report, in light and dark: of its charts (Vega's config) and, by the same names, of its page."""

from typing import Any

LIGHT = {
    "ink": "#1c2128", "faint": "#5d6773", "rule": "#d5dae1", "page": "#f4f6f8", "card": "#ffffff", "accent": "#1f6feb",
    "soft": "#e8eef7", "warn": "#9a4b00", "warned": "#fff3e0",
}  # fmt: skip
DARK = {
    "ink": "#e6edf3", "faint": "#9aa6b2", "rule": "#333c47", "page": "#0e1217", "card": "#171c23", "accent": "#6cb0ff",
    "soft": "#202a37", "warn": "#ffb86b", "warned": "#33261a",
}  # fmt: skip
_CATEGORIES = {
    "light": (
        "#2f6fde",
        "#e0752d",
        "#1e9b82",
        "#b0478f",
        "#8b7a1f",
        "#6a51c7",
        "#d1495b",
        "#5c6b7a",
        "#3aa0c9",
        "#7a9b2e",
    ),
    "dark": (
        "#6ea8fe",
        "#ff9d5c",
        "#4fd1b5",
        "#e58bcb",
        "#d8c45a",
        "#a893f5",
        "#ff8592",
        "#a9b6c4",
        "#6fd0f2",
        "#b3d568",
    ),
}
_HEAT = {  # from little to much: away from the page's ground
    "light": ("#fdf3e4", "#fbd49a", "#f59b4b", "#d9541e", "#7d1d0c"),
    "dark": ("#2a2019", "#6b3a16", "#bd5a12", "#f7993a", "#ffe6c2"),
}
_STEPS = {  # of ordered things, such as bits
    "light": ("#dbe9fb", "#9cc4f3", "#4f8fdf", "#1d55a8", "#0b2a5b"),
    "dark": ("#17304f", "#235a97", "#3f8bd9", "#85bdf7", "#dcecff"),
}


def chart_config(scheme: str) -> dict[str, Any]:
    """Return Vega-Lite's config of a scheme, "light" or "dark"."""
    colours, font = (LIGHT if scheme == "light" else DARK), "system-ui, -apple-system, 'Segoe UI', sans-serif"
    words = {"labelColor": colours["faint"], "titleColor": colours["faint"], "labelFont": font, "titleFont": font}
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": {
            **words, "gridColor": colours["rule"], "gridOpacity": 0.7, "domainColor": colours["rule"], "ticks": False,
            "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": 500, "labelPadding": 5, "titlePadding": 8,
        },
        "axisBand": {"grid": False, "domain": False},
        "legend": {**words, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": 500, "symbolType": "circle"},
        "text": {"color": colours["ink"], "font": font, "fontSize": 11},
        "line": {"strokeWidth": 2},
        "bar": {"color": _CATEGORIES[scheme][0]},
        "circle": {"color": colours["ink"]},
        "mark": {"color": _CATEGORIES[scheme][0]},
        "range": {
            "category": list(_CATEGORIES[scheme]), "heatmap": list(_HEAT[scheme]), "ramp": list(_HEAT[scheme]),
            "ordinal": list(_STEPS[scheme]),
        },
    }  # fmt: skip
