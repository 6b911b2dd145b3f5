"""How the page looks, in light and in dark."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --ink: #15181d; --soft: #5b6470; --faint: #e3e6ea;
  --ground: #f0f2f4; --blue: #2a78d6; --orange: #d9571f; --violet: #6b57c8; --green: #14905f;
  --yellow: #d19000; --magenta: #cf4f86; --red: #d23b3b; --teal: #0f8b9d; --grey: #9aa3ad; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101215; --card: #191c20; --ink: #e9ecef; --soft: #9aa4af; --faint: #2c3137;
  --ground: #22262b; --blue: #4a95ec; --orange: #ee7840; --violet: #9384ea; --green: #2cb583;
  --yellow: #dba11f; --magenta: #e2709f; --red: #ec6666; --teal: #35aebf; --grey: #6d7782; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 44px 0 6px; letter-spacing: -.005em; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
h3 span, .sub, .legend, .note { color: var(--soft); font-weight: 400; }
h3 span { font-size: 13px; margin-left: 6px; }
p { margin: 0 0 12px; max-width: 78ch; }
.sub { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 22px 0 0; }
.tile, .card { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.25; }
.tile span { color: var(--soft); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr));
  gap: 14px; }
.card { padding: 14px 16px 10px; min-width: 0; overflow-x: auto; }
.note { border-style: dashed; padding: 12px 16px; margin-top: 12px; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, monospace; background: var(--ground);
  border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; }
pre { margin: 8px 0; overflow-x: auto; }
pre code { background: none; padding: 0; display: block; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td { white-space: nowrap; } td:last-child { white-space: normal; }
.bad { color: var(--red); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 12px; font-size: 13px; }
.legend i { display: inline-block; width: 14px; height: 10px; margin-right: 6px;
  border-radius: 2px; }
summary { cursor: pointer; color: var(--soft); }
svg { display: block; width: 100%; height: auto; min-width: 420px; font-size: 11.5px; }
svg.wide { min-width: 900px; }
svg text { fill: var(--ink); }
svg text.tick { fill: var(--soft); }
svg text.rank { font-size: 13px; font-weight: 600; }
svg text.end { font-size: 12px; font-weight: 600; }
.grid { stroke: var(--faint); } .base { stroke: var(--grey); }
polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
polyline.training, polyline.layer { stroke: var(--blue); stroke-width: 2; }
polyline.noise { stroke: var(--blue); stroke-opacity: .28; stroke-width: 1; }
polyline.held { stroke: var(--orange); stroke-width: 1.5; }
circle.held { fill: var(--orange); stroke: var(--card); stroke-width: 1.5; }
svg text.training { fill: var(--blue); } svg text.held { fill: var(--orange); }
.save { fill: var(--grey); }
line.event { stroke: var(--soft); stroke-dasharray: 3 3; } svg text.event { fill: var(--soft); }
line.bad { stroke: var(--red); } svg text.bad { fill: var(--red); }
.hint { fill: var(--ink); fill-opacity: 0; } .hint:hover { fill-opacity: .07; }
.ground { fill: var(--ground); } .heat, .bar { fill: var(--blue); }
.stripe { stroke: var(--grey); stroke-width: 3; }
.odd { fill-opacity: .72; }
.p-forward { fill: var(--blue); background: var(--blue); }
.p-backward { fill: var(--violet); background: var(--violet); }
.p-update { fill: var(--green); background: var(--green); }
.p-data { fill: var(--yellow); background: var(--yellow); }
.p-other { fill: var(--grey); background: var(--grey); }
rect.wait { fill: url(#hatch); }
i.wait { background: repeating-linear-gradient(45deg, var(--grey) 0 2px, transparent 2px 5px); }
.a-tp { fill: var(--orange); background: var(--orange); }
.a-fsdp { fill: var(--teal); background: var(--teal); }
.a-replicate { fill: var(--magenta); background: var(--magenta); }
.a-ep { fill: var(--yellow); background: var(--yellow); }
.a-cp { fill: var(--green); background: var(--green); }
.a-pp { fill: var(--red); background: var(--red); }
.a-other { fill: var(--soft); background: var(--soft); }
@media print { body { background: none; } .card, .tile { break-inside: avoid; } }
"""
