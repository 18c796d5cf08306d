"use strict";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 760px)");
const status = document.getElementById("status");
const plots = [...document.querySelectorAll(".plot")];
let figures = {};
let darkColors = {};
const showingAll = new Set();

/* Plotly and the figures are compressed, which halves the page. */
async function inflate(id) {
  const text = document.getElementById(id).textContent.trim();
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

/* Copy of a figure's values with the colors of the present theme. */
function themed(value) {
  if (Array.isArray(value)) return value.map(themed);
  if (value !== null && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, themed(each)]));
  return dark.matches && !root.classList.contains("printing") && typeof value === "string" ? darkColors[value] ?? value : value;
}

function color(name) {
  return getComputedStyle(root).getPropertyValue(name).trim();
}

function template() {
  const axis = { gridcolor: color("--grid"), zerolinecolor: color("--grid"), automargin: true };
  const clear = "rgba(0,0,0,0)";
  return {
    layout: {
      paper_bgcolor: clear, plot_bgcolor: clear, xaxis: axis, yaxis: axis,
      hoverlabel: {
        align: "left", bgcolor: color("--page"), bordercolor: color("--muted"),
        font: { color: color("--ink"), size: 13 },
      },
      legend: { bgcolor: clear },
    },
  };
}

/* On a narrow screen panels are on top of each other and some axes are left out. */
function narrowed(figure) {
  const { data, layout } = figure;
  layout.margin = { ...layout.margin, l: 46, r: 12 };
  layout.font.size = 12;
  const panels = layout.meta?.panels ?? 1;
  if (panels > 1) {
    layout.height *= 0.8 * panels;
    for (let i = 1; i <= panels; i++) {
      const name = i === 1 ? "" : String(i);
      const top = 1 - (i - 1) / panels;
      layout["xaxis" + name].domain = [0, 1];
      const y = layout["yaxis" + name];
      y.domain = [top - 1 / panels + (i === panels ? 0 : 0.09), top];
      y.showticklabels = true;
    }
  }
  const kept = layout.meta?.narrow;
  if (kept) data[0].dimensions.forEach((each) => { each.visible = kept.includes(each.label); });
}

function shownFigure(plot) {
  const name = plot.id;
  const figure = themed(figures[name]);
  const { data, layout } = figure;
  layout.template = template();
  layout.font.color = color("--ink");
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // dragging scrolls
  if (showingAll.has(name)) {
    for (const [key, range] of Object.entries(layout.meta.all)) {
      const [axis] = key.split(".");
      layout[axis].range = range;
    }
    for (const trace of data) if (trace.meta === "beyond") trace.visible = false;
    for (const dimension of data[0].dimensions ?? []) if (dimension.label !== "frontier") delete dimension.range;
  }
  // Paper has its own width, as in report.css: A4 in landscape, with plots zoomed.
  if (root.classList.contains("printing")) layout.width = plot.closest(".wide") ? 1220 : 590;
  if (narrow.matches && !root.classList.contains("printing")) narrowed(figure);
  return figure;
}

function draw(plot) {
  const { data, layout } = shownFigure(plot);
  plot.style.minHeight = `${layout.height}px`;
  return Plotly.react(plot, data, layout, { displayModeBar: false, responsive: true });
}

function redraw() {
  for (const plot of plots) draw(plot);
}

/* Scale both axes of every panel about their centers. */
function zoom(plot, factor) {
  const changes = {};
  for (const [key, axis] of Object.entries(plot._fullLayout)) {
    if (!/^[xy]axis\d*$/.test(key) || !axis.range || axis.type === "category") continue;
    const [low, high] = axis.range.map(Number);
    const middle = (low + high) / 2;
    const half = ((high - low) / 2) * factor;
    changes[`${key}.range`] = [middle - half, middle + half];
  }
  Plotly.relayout(plot, changes);
}

/* Arrow keys walk over the points of a figure; their texts are read out. */
function walk(plot, event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const points = plot.data.flatMap((trace, curveNumber) =>
    trace.type === "scatter" && trace.visible !== false && Array.isArray(trace.text)
      ? (trace.hovertext ?? trace.text).map((text, pointNumber) => ({ curveNumber, pointNumber, text })) : []);
  if (points.length === 0) return;
  event.preventDefault();
  const at = Number(plot.dataset.at ?? (step > 0 ? -1 : points.length));
  const now = (at + step + points.length) % points.length;
  plot.dataset.at = now;
  const { curveNumber, pointNumber, text } = points[now];
  const { xaxis = "x", yaxis = "y" } = plot.data[curveNumber];
  Plotly.Fx.hover(plot, [{ curveNumber, pointNumber }], [xaxis + yaxis]);
  status.textContent = text.replaceAll("<br>", ", ");
}

function addButtons(plot) {
  const bar = plot.parentElement.querySelector(".buttons");
  const { data, layout } = figures[plot.id];
  const title = plot.dataset.title;
  const add = (text, label, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", `${label}: ${title}`);
    button.addEventListener("click", () => act(button));
    bar.append(button);
  };
  if (data[0]?.type === "scatter") {
    add("Zoom in", "Zoom in", () => zoom(plot, 0.7));
    add("Zoom out", "Zoom out", () => zoom(plot, 1 / 0.7));
    add("Reset", "Reset", () => draw(plot));
  }
  if (layout.meta?.all) {
    const text = (all) => (all ? "Hide outliers" : "Show outliers");
    add(text(false), text(false), (button) => {
      const all = !showingAll.delete(plot.id);
      if (all) showingAll.add(plot.id);
      button.textContent = text(all);
      button.setAttribute("aria-label", `${text(all)}: ${title}`);
      draw(plot);
    });
  }
}

async function drawAll() {
  const script = document.createElement("script");
  script.textContent = await inflate("plotly");
  document.head.append(script);
  ({ figures, dark: darkColors } = JSON.parse(await inflate("figures")));
  for (const plot of plots) {
    await draw(plot);
    addButtons(plot);
    plot.addEventListener("keydown", (event) => walk(plot, event));
  }
  for (const query of [dark, narrow]) query.addEventListener("change", redraw);
  const print = (now) => { root.classList.toggle("printing", now); redraw(); };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  root.dataset.drawn = "yes";
}

function copy(button) {
  const text = button.parentElement.querySelector("code").textContent;
  const done = () => { status.textContent = `copied: ${text}`; button.textContent = "Copied"; };
  const selected = () => { // without permission: a selection that the user can copy
    getSelection().selectAllChildren(button.parentElement.querySelector("code"));
    if (document.execCommand("copy")) done();
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, selected);
  else selected();
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

function sortBy(table, index, header) {
  const order = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const each of table.tHead.rows[0].cells) each.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.cells[index].textContent.trim()]);
  const missing = (text) => text === "-";
  const numeric = rows.every(([, text]) => missing(text) || /^[+-]?\d/.test(text));
  rows.sort(([, a], [, b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b); // last in both orders
    return order * (numeric ? parseFloat(a) - parseFloat(b) : a.localeCompare(b, "en", { numeric: true }));
  });
  table.tBodies[0].append(...rows.map(([row]) => row));
}

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const state = document.getElementById("state").value;
  const rows = [...document.querySelectorAll("#trials tbody tr")];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = (state && row.dataset.state !== state) || !words.every((word) => text.includes(word));
  }
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${rows.length} trials`;
}

for (const button of document.querySelectorAll("button[data-copy]"))
  button.addEventListener("click", () => copy(button));
for (const table of document.querySelectorAll("table.sorted"))
  [...table.tHead.rows[0].cells].forEach((header, index) =>
    header.firstElementChild.addEventListener("click", () => sortBy(table, index, header)));
if (document.getElementById("filter")) {
  for (const id of ["filter", "state"]) document.getElementById(id).addEventListener("input", filter);
  filter();
}
if (plots.length) drawAll().catch((error) => {
  for (const plot of plots) plot.textContent = `The figure cannot be drawn: ${error.message}`;
});
