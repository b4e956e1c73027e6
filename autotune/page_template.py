"""The frame and style of `report.html`: inline, light and dark, wide and narrow."""

from __future__ import annotations

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --ink:#1b1f24; --muted:#57606a; --paper:#ffffff; --card:#f6f8fa; --line:#d8dee4;
  --accent:#0072b2; --good:#00775a; --bad:#b34700; --shade:rgba(27,31,36,.28); }
@media (prefers-color-scheme: dark) { :root { --ink:#e6edf3; --muted:#9da7b1; --paper:#0f1419;
  --card:#1a2129; --line:#2f3842; --accent:#63b8ea; --good:#4cc9a3; --bad:#ff9a5c;
  --shade:rgba(190,205,220,.34); } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); line-height:1.5;
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
main { max-width:68rem; margin:0 auto; padding:2rem 1.1rem 4rem; }
header p.job { color:var(--muted); margin:0 0 .35rem; }
h1 { font-size:clamp(1.25rem,3.2vw,1.7rem); line-height:1.35; margin:0 0 .6rem; text-wrap:balance; }
h2 { font-size:1.12rem; margin:2.6rem 0 .6rem; }
h3 { font-size:1rem; margin:1.3rem 0 .4rem; }
p { margin:.4rem 0; max-width:60rem; }
.muted, figcaption { color:var(--muted); font-size:.92rem; }
.numbers { display:grid; grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr)); gap:.7rem;
  margin:1.4rem 0 0; }
.numbers div { background:var(--card); border:1px solid var(--line); border-radius:.55rem;
  padding:.65rem .8rem; }
.numbers b { display:block; font-size:1.3rem; font-variant-numeric:tabular-nums; }
.numbers span { color:var(--muted); font-size:.84rem; }
.badge { display:inline-block; border:1px solid currentColor; border-radius:1rem;
  padding:.02rem .6rem; font-size:.84rem; margin-right:.4rem; }
.good { color:var(--good); } .bad { color:var(--bad); } .accent { color:var(--accent); }
figure { margin:.4rem 0 0; }
figure div { overflow-x:auto; border:1px solid var(--line); border-radius:.55rem; background:#fff; }
figure img { display:block; width:100%; max-width:100%; height:auto; }
figure .hint { display:none; }
/* A shade at the edge past which a table goes on: covers scroll with the cells, shades do not. */
.scroll { overflow-x:auto; background:
  linear-gradient(to right,var(--paper) 40%,transparent) left/2.4rem 100% local,
  linear-gradient(to left,var(--paper) 40%,transparent) right/2.4rem 100% local,
  linear-gradient(to right,var(--shade),transparent) left/.7rem 100% scroll,
  linear-gradient(to left,var(--shade),transparent) right/.7rem 100% scroll;
  background-repeat:no-repeat; }
table { border-collapse:collapse; width:100%; font-size:.92rem; font-variant-numeric:tabular-nums; }
th, td { padding:.34rem .65rem; border-bottom:1px solid var(--line); text-align:right;
  white-space:nowrap; }
th { color:var(--muted); font-weight:600; }
th:first-child, td:first-child, .text { text-align:left; }
tr.winner td { font-weight:650; background:var(--card); }
@media (max-width:46rem) { main { padding-top:1.2rem; }
  figure .hint { display:inline; } figure div:focus img { width:44rem; max-width:none; }
  table { font-size:.84rem; } th, td { padding:.3rem .4rem; } th { white-space:normal; }
  th:first-child, td:first-child { white-space:normal; min-width:6.5rem; }
  .facts { font-size:.84rem; } .facts td:first-child { min-width:0; width:34%; padding-left:0;
  overflow-wrap:anywhere; } .facts td { padding-right:0; } }
table.wide { font-size:.84rem; } .wide th, .wide td { padding:.3rem .3rem; }
.facts td:last-child { text-align:left; white-space:normal; overflow-wrap:anywhere; }
.facts td:first-child { color:var(--muted); }
.words th, .words td { text-align:left; white-space:normal; overflow-wrap:break-word; }
details { margin:.5rem 0; } summary { cursor:pointer; color:var(--accent); padding:.2rem 0; }
code { font-size:.92em; }
</style>
</head>
<body><main>
$body
</main></body>
</html>
""")
