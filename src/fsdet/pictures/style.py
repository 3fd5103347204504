# SPDX-License-Identifier: AGPL-3.0-or-later
"""How a page looks: light and dark by the reader's own setting, one column on a phone, nothing fetched."""

STYLE = """
:root{color-scheme:light dark;--paper:#f6f6f3;--card:#fff;--ink:#1d2026;--soft:#5d626c;--rule:#e2e2dc;--line:#2465a8;
--good:#157a40;--bad:#b93a26;--miss:#8f640a}
@media(prefers-color-scheme:dark){:root{--paper:#131519;--card:#1b1e24;--ink:#e8e9ec;--soft:#a0a6b1;--rule:#2e323a;
--line:#74b0ec;--good:#4cc384;--bad:#f28a77;--miss:#e0b04a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 18px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 4px;letter-spacing:-.005em}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}
p{margin:4px 0 12px;color:var(--soft);max-width:80ch;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;margin:14px 0 0;font-size:.9rem}
a{color:var(--line);text-decoration:none}
a:hover,a:focus-visible{text-decoration:underline}
:focus-visible{outline:2px solid var(--line);outline-offset:2px;border-radius:4px}
.row{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));margin:18px 0}
.wide{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));margin:12px 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px;min-width:0}
.row b{display:block;font-size:1.5rem;line-height:1.25;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tiles figure{min-width:0}
.card span{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.class{margin:12px 0;border-left:5px solid var(--shade,var(--rule))}
.head{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;margin-bottom:8px}
.head span{font-variant-numeric:tabular-nums}
section{min-width:0}
.lane{display:grid;grid-template-columns:84px minmax(0,1fr);gap:10px;align-items:center;margin-top:4px}
.lane>span{font-size:.8rem;overflow-wrap:anywhere}
.lane>.hit,.lane>.miss,.lane>.false{color:var(--tone);font-weight:600}
.strip{display:flex;gap:8px;overflow-x:auto;padding:3px 3px 6px;scrollbar-width:thin}
.tiles{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));margin:12px 0}
.tiles.large{grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr))}
figure{margin:0;flex:0 0 auto;width:104px}
.tiles figure{width:auto}
figure img{display:block;width:100%;height:auto;border-radius:8px;border:2px solid var(--tone,var(--rule))}
figcaption{font-size:.74rem;color:var(--soft);line-height:1.3;margin-top:3px;overflow-wrap:anywhere}
.hit{--tone:var(--good)}.miss{--tone:var(--miss)}.false{--tone:var(--bad)}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font:10px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg .name{fill:var(--ink);font-size:11px;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg .grid{stroke:var(--rule)}svg .plain{fill:none;stroke:var(--rule)}svg .halo{stroke:var(--card);stroke-width:2}
svg .event{stroke:var(--bad);stroke-dasharray:2 3}
.map{max-width:620px}
.keys{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.82rem;margin-top:8px}
.keys span{overflow-wrap:anywhere;min-width:0}
.keys i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;background:var(--shade)}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
th,td{padding:5px 14px 5px 0;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;font-weight:400}
thead th{color:var(--soft);font-size:.8rem;vertical-align:bottom}
tbody tr:last-child>*{border-bottom:0}
th:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:8em;max-width:22em}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px;font-size:.8rem}
details{margin:10px 0}
summary{cursor:pointer;color:var(--line)}
footer{margin-top:48px;color:var(--soft);font-size:.82rem;overflow-wrap:anywhere}
@media(max-width:520px){main{padding:20px 12px 48px}
.lane{grid-template-columns:minmax(0,1fr);gap:2px}h1{font-size:1.4rem}}
"""
