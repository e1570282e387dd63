"use strict";
// Tables: a click on a header sorts, the box above filters. Charts: drawn from the JSON in #data, again when their width changes.

function sortBy(table, column, button) {
  const header = button.closest("th");
  const falling = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const value = (row) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent.trim().toLowerCase() : Number(cell.dataset.v);
  };
  const sign = falling ? -1 : 1;
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what has no number stays last
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = cell.querySelector("button");
    button.addEventListener("click", () => sortBy(table, column, button));
  });
}

for (const box of document.querySelectorAll("input[data-table]")) {
  const rows = [...document.getElementById(box.dataset.table).tBodies[0].rows];
  const count = box.closest(".filter").querySelector(".count");
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => texts.get(row).includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
  });
}

const data = JSON.parse(document.getElementById("data").textContent);
const short = (text, most) => (text.length > most ? `…${text.slice(1 - most)}` : text);
const number = (value) => (value === null ? "–" : String(Number(Number(value).toPrecision(3))));
const percent = (value) => `${Number((100 * value).toFixed(1))}%`;
const chosen = (kind) => document.querySelector(`[data-for="${kind}"]`)?.value;
const checked = (kind) => document.querySelector(`[data-log="${kind}"]`)?.checked ?? false;

function fill(id, rows) {
  const cells = (row) => row.map((value, i) => {
    const cell = document.createElement(i ? "td" : "th");
    if (!i) cell.scope = "row";
    cell.className = "n";
    cell.dataset.v = value;
    cell.textContent = value;
    return cell;
  });
  document.getElementById(id).tBodies[0].replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    line.append(...cells(row));
    return line;
  }));
}

const frame = (width, height) => ({ width, height, marginLeft: 56, marginRight: 20, marginBottom: 44, style: { fontSize: "12px" } });

const charts = {
  // Each group a row: 5 % to 95 % of its scores as a line, the middle half as a bar, the median, and where the cut fell.
  spread(all, width) {
    const positive = all.flatMap((g) => g.quantiles).filter((v) => v > 0);
    const least = positive.length ? Math.min(...positive) : 1;
    const log = positive.length > 0 && Math.max(...positive) > 20 * least;
    const at = (v) => (log ? Math.max(v, least) : v);
    const rows = all.map((g) => ({
      name: `${g.id}`, low: at(g.quantiles[0]), first: at(g.quantiles[1]), middle: at(g.quantiles[2]), third: at(g.quantiles[3]),
      high: at(g.quantiles[4]), cut: g.cut === null ? null : at(g.cut),
      title: `group ${g.id}: ${short(g.label, 40)}\n${g.units} units, ${g.gone} removed\nmedian ${number(g.quantiles[2])}` +
        (g.cut === null ? "" : `\nhighest removed ${number(g.cut)}`),
    }));
    const y = { y: "name" };
    return Plot.plot({
      ...frame(width, 80 + 17 * rows.length), marginTop: 32,
      x: { type: log ? "log" : "linear", label: log ? "score (logarithmic)" : "score", axis: "both", grid: true, ticks: Math.max(3, Math.round(width / 110)), tickFormat: number },
      y: { label: "group", domain: rows.map((r) => r.name) },
      marks: [
        Plot.ruleY(rows, { ...y, x1: "low", x2: "high", stroke: "var(--kept)" }),
        Plot.ruleY(rows, { ...y, x1: "first", x2: "third", stroke: "var(--kept)", strokeWidth: 7 }),
        Plot.tickX(rows, { ...y, x: "middle", stroke: "var(--page)", strokeWidth: 2 }),
        Plot.dot(rows.filter((r) => r.cut !== null), { ...y, x: "cut", fill: "var(--gone)", symbol: "diamond", r: 5 }),
        Plot.tip(rows, Plot.pointerY({ ...y, x: "middle", title: "title" })),
      ],
    });
  },

  // One group: how many units have which scores, what stays beside what goes.
  histogram(all, width, place) {
    const group = all.find((g) => String(g.id) === chosen("histogram")) ?? all[0];
    fill("histogram-table", group.kept.map((kept, i) => [number(group.edges[i]), number(group.edges[i + 1]), kept, group.removed[i]]));
    place.ariaLabel = `Scores of group ${group.id}: ${group.units} units, ${group.gone} removed, median ${number(group.quantiles[2])}`;
    const bins = ["kept", "removed"].flatMap((what) =>
      group[what].map((count, i) => ({ what, count, from: group.edges[i], to: group.edges[i + 1] })).filter((bin) => bin.count));
    return Plot.plot({
      ...frame(width, 290),
      x: { type: group.log ? "log" : "linear", label: group.log ? "score (logarithmic)" : "score", ticks: Math.max(3, Math.round(width / 110)), tickFormat: number },
      y: { label: "units", grid: true, tickFormat: String, ticks: Math.min(5, Math.max(...group.kept.map((kept, i) => kept + group.removed[i]))) },
      color: { domain: ["kept", "removed"], range: ["var(--kept)", "var(--gone)"] },
      marks: [
        Plot.rectY(bins, { x1: "from", x2: "to", y: "count", fill: "what", insetLeft: 0.5, insetRight: 0.5, tip: true,
          title: (b) => `${b.count} ${b.what}\nscore ${number(b.from)} to ${number(b.to)}` }),
        Plot.ruleY([0]),
      ],
    });
  },

  // Each group alone: what the outputs lose when it loses a share of its units.
  sensitivity(source, width) {
    const { measure, series } = chosen("sensitivity-measure") === "quality" ? source.quality : source;
    const log = checked("sensitivity"), one = chosen("sensitivity");
    const points = series.flatMap((s) => s.points.map(([ratio, change]) => ({ label: s.label, ratio, change })))
      .filter((p) => p.change !== null && (!log || p.change > 0));
    const plot = Plot.plot({
      ...frame(width, 370),
      x: { label: "share of the group's units removed", tickFormat: percent, ticks: Math.max(3, Math.round(width / 110)) },
      y: { label: measure, type: log ? "log" : "linear", grid: true, tickFormat: number, ticks: 6 },
      marks: [
        Plot.line(points, { x: "ratio", y: "change", z: "label", stroke: "var(--kept)", strokeOpacity: 0.6, strokeWidth: 1.5 }),
        Plot.dot(points, { x: "ratio", y: "change", fill: "var(--kept)", r: 2.5 }),
        Plot.dot(points, Plot.pointer({ x: "ratio", y: "change", stroke: "var(--gone)", r: 5, strokeWidth: 2 })),
        Plot.tip(points, Plot.pointer({ x: "ratio", y: "change",
          title: (p) => `${short(p.label, 44)}\n${percent(p.ratio)} removed: ${number(p.change)}` })),
      ],
    });
    const labels = [...new Set(points.map((p) => p.label))];
    const lines = [...plot.querySelectorAll('[aria-label="line"] path')];
    const light = (label) => lines.forEach((path, i) => path.classList.toggle("faint", Boolean(label) && labels[i] !== label));
    light(one);
    plot.addEventListener("input", () => light(plot.value ? plot.value.label : one));
    return plot;
  },

  // Whole models: what is left of the quality at each cost, the Pareto points ringed and joined.
  sweep({ measure, axes, points }, width) {
    const axis = axes.find((a) => a.key === chosen("sweep")) ?? axes[0];
    const shown = points.filter((p) => p[axis.key] !== null && p.value !== null).map((p) => ({ ...p, x: p[axis.key] * axis.scale }));
    const best = shown.filter((p) => p.pareto.includes(axis.key)).sort((a, b) => a.x - b.x);
    return Plot.plot({
      ...frame(width, 370),
      x: { label: axis.title, tickFormat: number, ticks: Math.max(3, Math.round(width / 110)), nice: true, inset: 10 },
      y: { label: measure, inset: 10, grid: true, tickFormat: number, nice: true },
      color: { legend: new Set(shown.map((p) => p.label)).size > 1, scheme: "Observable10" },
      marks: [
        Plot.line(best, { x: "x", y: "value", strokeDasharray: "4 3", strokeOpacity: 0.7 }),
        Plot.dot(shown, { x: "x", y: "value", fill: "label", r: 4.5 }),
        Plot.dot(best, { x: "x", y: "value", r: 8 }),
        Plot.tip(shown, Plot.pointer({ x: "x", y: "value",
          title: (p) => `${p.label}${p.ratio === null ? "" : `, ratio ${percent(p.ratio)}`}${best.includes(p) ? ", Pareto" : ""}\n${axis.title}: ${number(p.x)}\n${measure}: ${number(p.value)}` })),
      ],
    });
  },
};

function draw(place) {
  const kind = place.dataset.chart;
  const source = kind === "histogram" || kind === "spread" ? data.scores : data[kind];
  const plot = charts[kind](source, Math.max(260, place.clientWidth - 18), place);
  plot.style.background = "transparent";
  plot.ariaHidden = "true"; // the place has a label, and a table beside it
  place.replaceChildren(plot);
}

const places = [...document.querySelectorAll("[data-chart]")];
const watcher = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.dataset.width === String(target.clientWidth)) continue;
    target.dataset.width = target.clientWidth;
    requestAnimationFrame(() => draw(target));
  }
});
for (const place of places) {
  watcher.observe(place);
  for (const control of place.closest("figure").querySelectorAll("select, input[type=checkbox]"))
    control.addEventListener("change", () => draw(place));
}

// Links to a row of a table: no filter may hide it.
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#g"]');
  const row = link && document.getElementById(link.getAttribute("href").slice(1)).closest("tr");
  if (!row || !row.hidden) return;
  const box = document.querySelector(`input[data-table="${row.closest("table").id}"]`);
  box.value = "";
  box.dispatchEvent(new Event("input"));
});
