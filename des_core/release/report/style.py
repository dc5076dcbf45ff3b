"""The pages' look: one style sheet; light or dark as the reader prefers, one column on a phone, plain on paper."""

LIGHT = """color-scheme: light;
  --page: #f5f6f8; --card: #ffffff; --ink: #14181f; --soft: #566070; --rule: #e2e5ea; --grid: #eceef2;
  --shade: #14181f2e; --one: #2463c9; --two: #8fb1e8; --good: #0f6b45; --good-wash: #e3f4eb; --bad: #b3261e;
  --bad-wash: #fcebe9; --doubt: #835000; --doubt-wash: #fdf1dc;"""
DARK = """color-scheme: dark;
  --page: #0e1116; --card: #161b22; --ink: #e7eaef; --soft: #9aa5b5; --rule: #2a313b; --grid: #232a34;
  --shade: #000000b0; --one: #6ea4f7; --two: #3c5f99; --good: #5fd39a; --good-wash: #10281d; --bad: #ff8f85;
  --bad-wash: #331715; --doubt: #f2b857; --doubt-wash: #2e2210;"""

STYLE = (
    f":root {{ {LIGHT} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n"
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", sans-serif; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 56px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 18px; margin-bottom: 14px; }
h1 { margin: 0; font-size: 21px; line-height: 1.3; letter-spacing: -.01em; overflow-wrap: anywhere; }
h1 span { font-weight: 500; color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
header p { margin: 0; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
h2 { margin: 40px 0 10px; font-size: 18px; letter-spacing: -.005em; }
.soft { color: var(--soft); } .together { white-space: nowrap; }
.under { display: block; color: var(--soft); font-weight: 400; font-size: 12.5px; line-height: 1.4; }
p.lead { max-width: 84ch; margin: -4px 0 12px; color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }

.verdict { display: flex; gap: 16px; padding: 18px 22px 18px 18px; border: 1px solid; border-left-width: 8px;
  border-radius: 10px; color: var(--mark); background: var(--wash); }
.verdict .icon { flex: none; width: 42px; height: 42px; border-radius: 50%; color: var(--card);
  background: var(--mark); text-align: center; font-size: 24px; font-weight: 700; line-height: 42px; }
.verdict div { min-width: 0; }
.verdict h2 { margin: 3px 0 0; font-size: 24px; line-height: 1.35; letter-spacing: -.015em; overflow-wrap: anywhere; }
.verdict ul, .verdict p { margin: 6px 0 0; padding: 0; list-style: none; color: var(--ink); font-size: 14.5px;
  overflow-wrap: anywhere; }
.verdict li { padding: 1px 0; } .verdict details { margin-top: 4px; } .verdict .fault { font-weight: 600; }
.accept { --mark: var(--good); --wash: var(--good-wash); }
.reject { --mark: var(--bad); --wash: var(--bad-wash); }
.inconclusive, .not_comparable { --mark: var(--doubt); --wash: var(--doubt-wash); }
.waiting { --mark: var(--soft); --wash: var(--card); }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { padding: 1px 5px; border-radius: 4px; background: var(--card); white-space: nowrap; }

dl, dd, dt { margin: 0; }
.tile, figure, .panel, .facts { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 12px; }
.tile { padding: 12px 16px 13px; }
.tile dt, .tile small { display: block; color: var(--soft); font-size: 12.5px; line-height: 1.4; }
.tile b { display: block; margin: 1px 0; font-size: 25px; font-weight: 620; line-height: 1.25;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 248px), 1fr)); gap: 12px 28px;
  padding: 14px 18px 16px; }
.facts .across { grid-column: 1 / -1; }
.facts dt { color: var(--soft); font-size: 12.5px; }
.facts dd { font-size: 14.5px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 12px; }
.pair { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 12px; align-items: start; }
figure { margin: 0; padding: 14px 14px 8px; }
figcaption { font-size: 13px; color: var(--soft); line-height: 1.35; min-height: 2.7em; }
figcaption b { display: block; color: var(--ink); font-size: 15px; font-weight: 620; }
svg { display: block; width: 100%; max-width: 560px; height: auto; margin: 4px auto 0; }
svg text { font-family: inherit; font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .note, svg .aside { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .note { fill: var(--ink); font-weight: 600; font-size: 12px; }
svg .grid { stroke: var(--grid); } svg .base { stroke: var(--soft); stroke-opacity: .5; }
svg polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; stroke-width: 2; }
svg .one { stroke: var(--one); } svg .two { stroke: var(--two); } svg .bad { stroke: var(--bad); }
svg .faint { stroke: var(--one); stroke-opacity: .35; } svg .other { stroke: var(--soft); stroke-width: 1.5; }
svg .dashed { stroke: var(--soft); stroke-opacity: .7; stroke-dasharray: 4 4; }
svg .limit { stroke: var(--bad); stroke-dasharray: 3 3; }
svg .wash { fill: var(--one); fill-opacity: .08; }
svg .one-dot { fill: var(--one); stroke: var(--card); stroke-width: 1.5; }
svg .bad-dot { fill: var(--bad); stroke: var(--card); stroke-width: 1.5; }
svg.small { width: 120px; margin: 3px 0 0; }

.panel { overflow-x: auto; background:
  linear-gradient(to left, var(--card) 30%, transparent) right / 44px 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 12px 100% no-repeat scroll, var(--card); }
.panel:focus-visible, pre:focus-visible, summary:focus-visible { outline: 2px solid var(--one); outline-offset: 2px; }
.narrow { max-width: 680px; } .narrow + .panel { margin-top: 12px; }
.more { margin: 8px 2px 0; color: var(--soft); font-size: 13px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 8px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr > :first-child { padding-left: 16px; } tr > :last-child { padding-right: 16px; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; } tbody th.words { white-space: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead .number { white-space: normal; }
.words { min-width: 150px; overflow-wrap: anywhere; } .about { min-width: 190px; overflow-wrap: anywhere; }
.bars { min-width: 110px; width: 26%; } .drawing { width: 140px; min-width: 140px; white-space: nowrap; }
thead .drawing { text-align: center; }
.kept, .broken { white-space: nowrap; font-size: 13px; color: var(--good); }
.broken { padding: 2px 8px; margin-left: -8px; border-radius: 20px; color: var(--bad); background: var(--bad-wash);
  font-weight: 600; }
.bar { display: block; height: 8px; min-width: 1px; margin: 4px 0; border-radius: 2px; background: var(--one); }
.bars .bar:only-child { margin: 7px 0; }
.bar.predicted { background: var(--two); } .bar.bad { background: var(--bad); }
.share { display: inline-block; width: 56px; height: 8px; margin-right: 8px; border-radius: 2px;
  background: var(--grid); overflow: hidden; }
.share .bar { margin: 0; min-width: 0; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 0;
  background: var(--one); } .key.predicted { background: var(--two); }
details { margin-top: 36px; } summary { cursor: pointer; color: var(--soft); font-size: 14px; width: fit-content; }
pre { overflow-x: auto; }
footer { margin-top: 28px; color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }

@media (max-width: 860px) { .pair { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 560px) { main { padding: 14px 12px 40px; } h2 { margin-top: 32px; }
  .verdict { gap: 11px; padding: 14px 14px 14px 10px; border-left-width: 6px; }
  .verdict h2 { margin: 0; font-size: 20px; }
  .verdict .icon { width: 28px; height: 28px; font-size: 16px; line-height: 28px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } .figures { gap: 8px; } .tile { padding: 9px 12px 10px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .facts { grid-template-columns: minmax(0, 1fr); gap: 8px; padding: 12px 14px; }
  .facts div:not(.across) { display: flex; justify-content: space-between; align-items: baseline; gap: 14px; }
  .facts div:not(.across) dd { text-align: right; }
  th, td { padding: 8px 7px; } tr > :first-child { padding-left: 12px; } tr > :last-child { padding-right: 12px; }
  .broken { margin-left: -4px; padding: 2px 6px; }
  .tile b { font-size: 21px; } figcaption { min-height: 0; } .bars { min-width: 80px; }
  .words { min-width: 128px; } .words.long { min-width: 196px; }
  .panel tbody th:first-child { position: sticky; left: 0; background: var(--card); } }
@media print { body { background: #fff; font-size: 12px; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .panel { overflow: visible; } figure, .tile, .verdict, tr { break-inside: avoid; } h2, .lead { break-after: avoid; } }
"""
)
