"""The style sheet of every report: light, dark, narrow and printed.

Series colours are from Okabe and Ito (2008), chosen to stay apart under the common colour-vision deficiencies; dashes
and marker shapes repeat the distinction for print. Chart text grows on narrow screens, where the drawings shrink.
"""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root {
  --paper: #f8f7f4; --card: #ffffff; --ink: #1f2429; --muted: #5d666f; --rule: #e3e0d9; --accent: #0072b2;
  --warn-paper: #fff6e5; --warn-rule: #e69f00; --code: #f2f0eb;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0588a; --c4: #8a6d00; --c5: #6b7278;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #121518; --card: #1a1e22; --ink: #e7e9eb; --muted: #9ea7af; --rule: #2e343a; --accent: #6cbcf0;
    --warn-paper: #2b2415; --warn-rule: #c98a00; --code: #23282d;
    --c0: #56b4e9; --c1: #f08a3c; --c2: #2fc49a; --c3: #e39cc6; --c4: #d9b73a; --c5: #9ea7af;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans",
    "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.015em; margin: 4px 0 8px; font-weight: 650; }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -0.01em; margin: 0 0 14px; font-weight: 620; }
h3 { font-size: 1rem; line-height: 1.4; margin: 0; font-weight: 620; }
p { margin: 0 0 12px; max-width: 70ch; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 3px; }
section { margin-top: 52px; scroll-margin-top: 16px; }
.eyebrow { color: var(--muted); font-size: 0.82rem; letter-spacing: 0.06em; text-transform: uppercase; margin: 0; }
.sub, .note { color: var(--muted); }
.note { margin: -10px 0 16px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 18px; padding: 12px 0;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); font-size: 0.9rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: 0.85rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px; min-width: 0; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.split { display: grid; gap: 20px 40px; align-items: center;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.tiles { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 244px), 1fr)); }
.tile .value { font-size: 1.7rem; line-height: 1.25; font-weight: 620; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile .spread, .tile .why { color: var(--muted); font-size: 0.86rem; line-height: 1.45; }
.tile .spread { font-variant-numeric: tabular-nums; }
.tile .why { margin-top: 8px; }
.tile .name { overflow-wrap: anywhere; font-size: 0.9rem; font-weight: 560; }
.account p:last-child { margin-bottom: 0; }
.glossary { display: grid; gap: 18px 40px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.glossary p { margin: 2px 0 0; font-size: 0.94rem; }
.warning { background: var(--warn-paper); border-left: 4px solid var(--warn-rule); border-radius: 6px;
  padding: 12px 16px; margin: 12px 0 0; }
.warning p { margin: 0; }
.steps { list-style: none; margin: 0; padding: 0; display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.steps li { position: relative; display: flex; flex-direction: column; }
.steps .when { color: var(--muted); font-size: 0.85rem; font-variant-numeric: tabular-nums; }
.steps p { font-size: 0.9rem; margin: 6px 0 10px; color: var(--muted); line-height: 1.5; }
.steps dl { margin: 0 0 12px; font-size: 0.88rem; }
.steps dt { color: var(--muted); overflow-wrap: anywhere; }
.steps dd { margin: 0 0 6px; font-variant-numeric: tabular-nums; font-weight: 560; }
.steps a { margin-top: auto; font-size: 0.9rem; }
figure { margin: 0; }
.figure-head { display: flex; justify-content: space-between; gap: 12px; align-items: baseline; }
.trend { color: var(--muted); font-size: 0.86rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
figcaption p { margin: 0 0 4px; }
figcaption { color: var(--muted); font-size: 0.86rem; line-height: 1.5; margin-top: 8px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0;
  font-size: 0.85rem; color: var(--muted); }
.legend svg { width: 26px; height: 12px; vertical-align: -1px; margin-right: 6px; display: inline; }
details { margin-top: 8px; font-size: 0.86rem; color: var(--muted); }
summary { cursor: pointer; }
details dl { margin: 8px 0 0; }
details dt { font-weight: 560; color: var(--ink); margin-top: 8px; overflow-wrap: anywhere; }
details dd { margin: 0; }
details.more { font-size: 1rem; margin-top: 16px; }
details.more > summary { color: var(--muted); margin-bottom: 12px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.86em; }
code { background: var(--code); border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: 8px; padding: 14px 16px; margin: 8px 0 0; color: var(--ink);
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; color: var(--ink); margin-top: 8px; }
th, td { text-align: left; vertical-align: top; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--rule);
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--muted); width: 38%; }
th small, td small { display: block; font-weight: 400; font-size: 0.9em; line-height: 1.4; }
.models th[scope=row] { color: var(--ink); min-width: 9em; }
.models th[scope=col] { color: var(--ink); font-weight: 620; width: auto; }
.models small { color: var(--muted); }
.guards th, .guards td { width: auto; overflow-wrap: normal; }
.guards td:last-child { width: 62%; min-width: 16em; }
.guards td strong { color: var(--ink); }
.models td { font-variant-numeric: tabular-nums; overflow-wrap: normal; min-width: 6.5em; }
.models tr:last-child > * { border-bottom: 0; }
.scroll { overflow-x: auto; }
.tiles + .scroll, .account + .tiles, .account + .scroll { margin-top: 16px; }
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li { margin-bottom: 14px; }
.verdicts li:last-child { margin-bottom: 0; }
.verdicts .detail { color: var(--muted); font-size: 0.9rem; font-variant-numeric: tabular-nums; }
.exchange { margin-bottom: 16px; break-inside: avoid; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 560; margin: 0 0 12px; max-width: none; }
.answers { display: grid; gap: 12px 22px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.answer { border-left: 3px solid var(--c); padding: 2px 0 2px 12px; min-width: 0; }
.answer .who { display: flex; flex-wrap: wrap; gap: 2px 10px; justify-content: space-between;
  font-size: 0.82rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.answer .who b { color: var(--ink); font-weight: 620; }
.answer .said { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.95rem; line-height: 1.5;
  max-height: 22em; overflow-y: auto; }
.empty { color: var(--muted); font-style: italic; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
svg { display: block; width: 100%; height: auto; max-width: 540px; margin: 6px auto 0; overflow: visible; }
svg text { font-size: 13px; fill: var(--muted); font-variant-numeric: tabular-nums; font-family: inherit; }
svg text.strong { fill: var(--ink); font-weight: 560; }
svg .tick { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--muted); stroke-width: 1; }
svg .reference { stroke: var(--muted); stroke-width: 1.25; stroke-dasharray: 4 4; fill: none; }
svg .line { stroke: var(--c); stroke-width: 2.25; fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .c1.line { stroke-dasharray: 8 4; } svg .c2.line { stroke-dasharray: 2 5; }
svg .c3.line { stroke-dasharray: 10 4 2 4; }
svg .c5.line { stroke-dasharray: 4 4; stroke-width: 1.25; }
svg .band { fill: var(--c); opacity: 0.16; }
svg .dot { fill: var(--c); opacity: 0.7; stroke: var(--card); stroke-width: 1; }
svg .whisker { stroke: var(--c); stroke-width: 2.5; fill: none; }
svg .bar { fill: var(--c); opacity: 0.45; stroke: var(--c); stroke-width: 1; }
svg .hit { fill: transparent; }
svg .hit:hover { fill: var(--c); }
@media (max-width: 560px) {
  main { padding: 28px 16px 48px; }
  h1 { font-size: 1.6rem; }
  section { margin-top: 40px; }
  .card { padding: 14px; }
  svg text { font-size: 17px; }
  th { width: 44%; }
}
@media print {
  :root { --paper: #ffffff; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  nav, figcaption summary { display: none; }
  h2, h3, .note { break-after: avoid; }
  .grid, .split { grid-template-columns: 1fr 1fr; }
  .steps { grid-template-columns: repeat(4, 1fr); }
  .answers { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
  svg text { font-size: 15px; }
  .card, figure, .exchange, li { break-inside: avoid; }
  .answer .said { max-height: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
  svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
