"""The contrast of every text of a page with what is behind it, as JavaScript."""

from __future__ import annotations

CONTRASTS = """() => {
  const luminance = ([r, g, b]) => {
    const linear = (v) => (v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    const [x, y, z] = [r, g, b].map(linear);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color[3] !== 0) return color;
    }
  };
  const found = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.closest('svg, script')) continue;
    const [a, b] = [parse(getComputedStyle(node).color), ground(node)].map(luminance).sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), `${node.tagName}.${node.className} ${node.textContent.slice(0, 30)}`]);
  }
  return found;
}"""
