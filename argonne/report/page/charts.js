"use strict";
// The report's curves, drawn by uPlot from the data that the page holds. A name or a text only ever becomes text.

const RELOAD_SECONDS = 45;
const WINDOWS = [0, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000]; // steps
const DASHES = [[], [7, 4], [2, 3], [8, 3, 2, 3]];
const MARKS = {
  resume: ["--muted", [6, 4]], stop: ["--muted", [2, 3]], change: ["--muted", [2, 3]],
  skip: ["--alert", []], warning: ["--alert", [2, 3]],
};

// ------------------------------------------------------------------------------------------------------------- numbers

/** Mean over the values of the last `window` steps at each value; what is null stays null and counts for nothing. */
function movingMean(steps, values, window) {
  let first = 0, total = 0, count = 0;
  return values.map((value, index) => {
    if (value === null) return null;
    total += value;
    count += 1;
    for (; steps[first] <= steps[index] - window; first += 1) {
      if (values[first] === null) continue;
      count -= 1;
      const left = total - values[first];
      // Beside a value that was far larger, the others' digits are gone: they are added up anew.
      total = Math.abs(left) > 1e-6 * Math.abs(values[first]) ? left
        : values.slice(first + 1, index + 1).reduce((sum, other) => sum + (other ?? 0), 0);
    }
    return total / count;
  });
}

/** Where `step` lies on an axis that is known at `steps`: on the line between its neighbours. */
function placed(step, steps, places) {
  let low = 0, high = steps.length - 1;
  if (step <= steps[low]) return places[low];
  if (step >= steps[high]) return places[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return places[low] + (places[high] - places[low]) * (step - steps[low]) / (steps[high] - steps[low]);
}

/** uPlot's columns of curves {x, ys}: rows in the order of x, with no value where a curve has none at that place. */
function merged(curves) {
  const order = curves.flatMap((curve, number) => curve.x.map((x, index) => [x, index, number]));
  order.sort((one, other) => one[0] - other[0] || one[1] - other[1]);
  const rows = [], xs = [];
  for (const [x, index, number] of order) {
    if (xs.at(-1) !== x || rows.at(-1)[number] !== undefined) {
      xs.push(x);
      rows.push([]);
    }
    rows.at(-1)[number] = index;
  }
  const columns = curves.flatMap((curve, number) => curve.ys.map((values) => rows.map((row) => values[row[number]])));
  return [xs, ...columns];
}

/** A short label of an axis whose labels are `apart`: 1,500, 120k, 2.5M, 3e-4. */
function compact(value, apart) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3) return Number(value.toPrecision(3)).toExponential();
  const [unit, letter] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e5, "k"]].find(([size]) => Math.abs(value) >= size)
    ?? [1, ""];
  const size = letter === "k" ? 1e3 : unit;
  let digits = 0;
  for (let rest = apart / size; digits < 6 && Math.abs(rest - Math.round(rest)) > 1e-6 * rest; rest *= 10) digits += 1;
  return (value / size).toLocaleString("en", { maximumFractionDigits: digits }) + letter;
}

/** A value to read: whole numbers whole, others to five digits. */
function exact(value) {
  if (value === undefined || value === null) return "n/a";
  if (Math.abs(value) < 1e-3 && value !== 0) return Number(value.toPrecision(5)).toExponential();
  return value.toLocaleString("en", Number.isInteger(value) ? {} : { maximumSignificantDigits: 5 });
}

// --------------------------------------------------------------------------------------------------------------- state

const data = JSON.parse(document.getElementById("data").textContent);
const controls = document.getElementById("controls");
const lastStep = Math.max(...data.steps.map((steps) => steps.at(-1) ?? 0));
const state = { x: "step", smooth: null, zoom: null, log: new Set(), open: new Set() };
let charts = [];

/** What a reload keeps lies in the address. */
function remember() {
  const kept = new URLSearchParams({ x: state.x, smooth: state.smooth });
  if (state.zoom) kept.set("zoom", state.zoom.join(" "));
  for (const title of state.log) kept.append("log", title);
  for (const title of state.open) kept.append("open", title);
  location.replace(`#${kept}`);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const windows = WINDOWS.filter((window) => window < Math.max(lastStep, 11));
  const smooth = data.panels.flatMap((panel) => panel.curves.filter((curve) => curve.smooth));
  const apart = Math.max(...smooth.map((curve) => data.steps[curve.steps].at(-1) / curve.values.length));
  const usual = Math.max(5 * apart, lastStep / 50); // five records at least, a fiftieth of a long run
  const asked = Number(kept.get("smooth") ?? NaN);
  state.x = known(kept.get("x")) ? kept.get("x") : "step";
  state.smooth = windows.includes(asked) ? asked : windows.find((window) => window >= usual) ?? windows.at(-1);
  const zoom = (kept.get("zoom") ?? "").split(" ").map(Number);
  state.zoom = zoom.length === 2 && zoom[0] < zoom[1] ? zoom : null;
  const switched = data.panels.filter((panel) => panel.logarithmic).map((panel) => panel.title);
  state.log = new Set(kept.has("x") ? kept.getAll("log") : switched);
  state.open = new Set(kept.getAll("open"));
  for (const window of windows) {
    const name = window ? `${window.toLocaleString("en")} steps` : "none";
    controls.elements.smooth.add(new Option(name, window, false, window === state.smooth));
  }
  for (const radio of controls.elements.x) {
    radio.disabled = !known(radio.value);
    radio.checked = radio.value === state.x;
  }
}

/** May `axis` be chosen: does each run know it? */
function known(axis) {
  return axis === "step" || (["tokens", "hours"].includes(axis) && data.runs.every((run) => run[axis].values.length));
}

function placeOf(run, step) {
  if (state.x === "step") return step;
  const axis = data.runs[run][state.x];
  return placed(step, data.steps[axis.steps], axis.values);
}

function zoom(range) {
  state.zoom = range;
  controls.elements.whole.disabled = !range;
  for (const chart of charts) chart.setData(chart.data);
  remember();
}

// -------------------------------------------------------------------------------------------------------------- charts

function themed(variable) {
  return getComputedStyle(document.documentElement).getPropertyValue(variable);
}

/** The lines of a panel: each curve as it is and, smoothed, its moving mean over it. */
function linesOf(panel) {
  return panel.curves.flatMap((curve) => {
    const smooth = curve.smooth && state.smooth > 0;
    return smooth ? [{ curve, faint: true }, { curve, faint: false }] : [{ curve, faint: false }];
  });
}

function columnsOf(panel, logarithmic) {
  return merged(panel.curves.map((curve) => {
    const steps = data.steps[curve.steps];
    const means = curve.smooth && state.smooth > 0 ? [movingMean(steps, curve.values, state.smooth)] : [];
    const ys = [curve.values, ...means];
    const positive = (values) => values.map((value) => (value > 0 ? value : null));
    return { x: steps.map((step) => placeOf(curve.run, step)), ys: logarithmic ? ys.map(positive) : ys };
  }));
}

function seriesOf({ curve, faint }) {
  return {
    label: curve.label || curve.name,
    stroke: themed(`--run${curve.colour % 6}`),
    width: faint ? 1 : 1.75,
    alpha: faint ? 0.32 : 1,
    dash: DASHES[curve.dash % 4],
    points: { show: curve.points || curve.values.length === 1, size: 5, fill: themed("--card") },
  };
}

/** The row nearest to the one under the pointer where this line has a value; none beyond the line's ends. */
function nearest(chart, series, row, x) {
  const values = chart.data[series], places = chart.data[0];
  if (!series || (values[row] ?? null) !== null) return row;
  let before = row, after = row;
  while (before >= 0 && (values[before] ?? null) === null) before -= 1;
  while (after < values.length && (values[after] ?? null) === null) after += 1;
  if (before < 0 || after >= values.length) {
    const end = before < 0 ? after : before;
    return Math.abs(chart.valToPos(places[end] ?? Infinity, "x") - chart.valToPos(x, "x")) < 12 ? end : null;
  }
  return x - places[before] <= places[after] - x ? before : after;
}

function drawMarks(chart, panel) {
  const { ctx, bbox } = chart;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.lineWidth = devicePixelRatio;
  for (const mark of panel.marks) {
    const [variable, dash] = MARKS[mark.kind];
    const x = Math.round(chart.valToPos(placeOf(mark.run, mark.step), "x", true));
    ctx.strokeStyle = themed(data.runs.length > 1 ? `--run${mark.run % 6}` : variable);
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

function element(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}

/** The legend that follows the pointer: where it is, each curve's value there, and the marks that it touches. */
function showTip(chart, tip, panel, lines) {
  const { left, top, idx, idxs } = chart.cursor;
  tip.hidden = idx === null || idx === undefined || left < 0 || !chart.cursor.event;
  if (tip.hidden) return;
  const x = chart.data[0][idx];
  const rows = [element("strong", state.x === "step" ? `step ${exact(x)}` : `${exact(x)} ${state.x}`)];
  lines.forEach(({ curve, faint }, index) => {
    const at = idxs[index + 1];
    if (at === null || at === undefined || faint) return;
    const row = element("div"), swatch = element("i", "", `swatch dash${curve.dash % 4}`);
    swatch.style.color = themed(`--run${curve.colour % 6}`);
    const raw = lines[index - 1]?.curve === curve ? chart.data[index][at] : null;
    row.append(swatch, curve.label && `${curve.label} `);
    row.append(element("b", exact(raw ?? chart.data[index + 1][at])));
    if (raw !== null) row.append(element("span", ` mean ${exact(chart.data[index + 1][at])}`));
    if (curve.points && chart.data[0][at] !== x) row.append(element("span", ` at ${exact(chart.data[0][at])}`));
    rows.push(row);
  });
  for (const mark of panel.marks) {
    if (Math.abs(chart.valToPos(placeOf(mark.run, mark.step), "x") - left) > 5) continue;
    const whose = data.runs.length > 1 ? `${data.runs[mark.run].name}: ` : "";
    const text = mark.text.length > 100 ? `${mark.text.slice(0, 100)}..` : mark.text;
    rows.push(element("div", `${whose}${mark.kind} at step ${exact(mark.step)} ${text}`, "mark"));
  }
  tip.replaceChildren(...rows);
  const { clientWidth: wide, clientHeight: high } = chart.over;
  const right = left < wide / 2; // where there is more room, and never out of the chart's frame
  const beside = right ? Math.min(left + 14, wide + 14 - tip.offsetWidth) : Math.max(-54, left - 14 - tip.offsetWidth);
  tip.style.left = `${beside}px`;
  tip.style.top = `${Math.max(0, Math.min(top - 10, high - tip.offsetHeight))}px`;
}

function draw(panel, figure) {
  const holder = figure.querySelector(".plot"), logarithmic = state.log.has(panel.title);
  const lines = linesOf(panel), tip = element("div", "", "tip"), last = data.runs.map((_, run) => placeOf(run, lastStep));
  tip.hidden = true;
  const axis = { stroke: themed("--muted"), ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const labels = (chart, splits, _, __, apart) =>
    splits.map((value) => (value === null ? null : compact(value, apart || Math.abs(value))));
  const options = {
    width: holder.clientWidth,
    height: 236,
    padding: [10, 14, 0, 0],
    legend: { show: false },
    scales: {
      x: { time: false, range: () => state.zoom ?? [0, Math.max(...last) || 1] },
      y: logarithmic ? { distr: 3 } : panel.zero ? { range: (_, __, high) => [0, high > 0 ? high * 1.06 : 1] } : {},
    },
    axes: [
      { ...axis, size: 30, space: 62, grid: { show: false }, values: labels },
      {
        ...axis, size: 54, space: 34, grid: { stroke: themed("--grid"), width: 1 },
        values: logarithmic ? (chart, splits) => splits.map((value) => value && compact(value, value)) : labels,
      },
    ],
    series: [{}, ...lines.map(seriesOf)],
    cursor: {
      y: false,
      dataIdx: nearest,
      drag: { x: true, y: false, setScale: false },
      bind: { dblclick: () => () => zoom(null) },
      points: { show: (chart, series) => !lines[series - 1].faint && undefined, size: 7 },
      sync: { key: "report", filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
    },
    hooks: {
      draw: [(chart) => drawMarks(chart, panel)],
      setCursor: [(chart) => showTip(chart, tip, panel, lines)],
      setSelect: [(chart) => {
        const { left, width } = chart.select;
        if (width > 4) zoom([chart.posToVal(left, "x"), chart.posToVal(left + width, "x")]);
        chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      }],
    },
  };
  const chart = new uPlot(options, columnsOf(panel, logarithmic), holder);
  chart.over.append(tip);
  return chart;
}

function drawAll() {
  for (const chart of charts) chart.destroy();
  const figures = document.querySelectorAll("figure[data-panel]");
  charts = data.panels.map((panel, number) => draw(panel, figures[number]));
  controls.elements.whole.disabled = !state.zoom;
}

// --------------------------------------------------------------------------------------------------------------- reader

function listen() {
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("change", () => {
    if (controls.elements.x.value !== state.x) state.zoom = null;
    state.x = controls.elements.x.value;
    state.smooth = Number(controls.elements.smooth.value);
    drawAll();
    remember();
  });
  controls.elements.whole.addEventListener("click", () => zoom(null));
  data.panels.forEach((panel, number) => {
    const label = document.querySelector(`figure[data-panel="${number}"] .log`), box = label.firstElementChild;
    label.hidden = false;
    box.checked = state.log.has(panel.title);
    box.addEventListener("change", () => {
      state.log[box.checked ? "add" : "delete"](panel.title);
      charts[number].destroy();
      charts[number] = draw(panel, label.closest("figure"));
      remember();
    });
  });
  for (const part of document.querySelectorAll("details")) {
    const title = part.firstElementChild.textContent;
    part.open ||= state.open.has(title);
    part.firstElementChild.addEventListener("click", () => {
      state.open[part.open ? "delete" : "add"](title); // it is switched after the click
      remember();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("resize", () => {
    for (const chart of charts) chart.setSize({ width: chart.root.parentElement.clientWidth, height: chart.height });
  });
}

/** While a run lives: the page again, unless someone selects something in it. */
function reloadLater() {
  document.getElementById("refresh").textContent = `reloads every ${RELOAD_SECONDS} s while the run lives`;
  setInterval(() => {
    if (!document.hidden && getSelection().isCollapsed && !document.querySelector(":active")) location.reload();
  }, 1000 * RELOAD_SECONDS);
}

recall();
listen();
drawAll();
controls.hidden = false;
document.getElementById("unscripted").hidden = true;
if (data.live) reloadLater();
