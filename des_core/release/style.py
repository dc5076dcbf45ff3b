"""The report's look: one style sheet, light and dark by the reader's preference, one column on a phone."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #14181f; --soft: #5a6472; --rule: #e3e6eb; --grid: #eceef2;
  --one: #2463c9; --two: #b4c9ee; --good: #12714a; --good-wash: #e6f4ed; --bad: #b3261e; --bad-wash: #fcebe9;
  --doubt: #8a5300; --doubt-wash: #fdf2df; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1116; --card: #161b22; --ink: #e7eaef; --soft: #98a3b3; --rule: #2a313b; --grid: #222933;
  --one: #6ea4f7; --two: #34507e; --good: #5fd39a; --good-wash: #10281d; --bad: #ff8f85; --bad-wash: #331715;
  --doubt: #f2b857; --doubt-wash: #2e2210; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 56px; }
header p { margin: 0; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
header h1 { margin: 2px 0 18px; font-size: 26px; line-height: 1.2; letter-spacing: -.01em; }
h2 { margin: 40px 0 12px; font-size: 18px; letter-spacing: -.005em; }
.verdict { padding: 16px 20px; border: 1px solid; border-radius: 10px; }
.verdict b { display: block; font-size: 19px; line-height: 1.3; }
.verdict ul { margin: 6px 0 0; padding: 0; list-style: none; color: var(--ink); font-size: 14px; }
.verdict li { padding: 1px 0; overflow-wrap: anywhere; }
.accept { color: var(--good); background: var(--good-wash); }
.reject { color: var(--bad); background: var(--bad-wash); }
.inconclusive, .not_comparable { color: var(--doubt); background: var(--doubt-wash); }
.waiting { color: var(--soft); background: var(--card); border-color: var(--rule); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 12px; margin-top: 14px; }
.tile, figure, .panel { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px 13px; }
.tile span, .tile small { display: block; color: var(--soft); font-size: 12.5px; }
.tile strong { display: block; margin: 1px 0; font-size: 25px; font-weight: 620; line-height: 1.25;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 14px 14px 8px; }
figcaption { font-size: 13px; color: var(--soft); line-height: 1.35; min-height: 2.7em; }
figcaption b { display: block; color: var(--ink); font-size: 15px; font-weight: 620; }
svg { display: block; width: 100%; height: auto; margin-top: 4px; }
svg text { font-family: inherit; font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .note { fill: var(--ink); font-weight: 600; font-size: 12px; }
svg .grid { stroke: var(--grid); } svg .base { stroke: var(--soft); stroke-opacity: .5; }
svg polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .one { stroke: var(--one); stroke-width: 2; } svg .two { stroke: var(--two); stroke-width: 2; }
 svg .faint { stroke: var(--one); stroke-opacity: .35; }
svg .dashed { stroke: var(--soft); stroke-opacity: .7; stroke-dasharray: 4 4; }
svg .wash { fill: var(--one); fill-opacity: .08; }
svg .one-dot { fill: var(--one); stroke: var(--card); stroke-width: 1.5; }
.panel { padding: 6px 16px; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 8px 12px 8px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; font-size: 12.5px; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.bar { display: block; height: 8px; min-width: 1px; margin: 4px 0; border-radius: 2px; background: var(--one); }
.bar.predicted { background: var(--two); }
.bars { min-width: 110px; width: 34%; }
.together { white-space: nowrap; }
.share { display: inline-block; width: 56px; height: 8px; margin-right: 8px; border-radius: 2px;
  background: var(--grid); }
.share i { display: block; height: 8px; border-radius: 2px; background: var(--one); }
.soft { color: var(--soft); } .key { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin: 0 5px 0 0; background: var(--one); } .key.predicted { background: var(--two); }
 .narrow { max-width: 640px; } .narrow + .panel { margin-top: 12px; }
.tight { width: 1%; white-space: nowrap; padding-right: 28px; }
p.lead { max-width: 84ch; }
p.lead { margin: -6px 0 12px; color: var(--soft); font-size: 14px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--soft); font-size: 14px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 44px; color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 18px 14px 40px; } header h1 { font-size: 22px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } .figures { gap: 8px; } .tile { padding: 10px 12px; }
  .tile strong { font-size: 21px; } figcaption { min-height: 0; } .verdict { padding: 13px 15px; }
  .panel { padding: 4px 12px; } .wide { display: none; } .bars { min-width: 64px; } }
@media print { body { background: #fff; } figure, .tile, .panel { break-inside: avoid; } }
"""
