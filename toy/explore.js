// What moves in toy/explore.html.  film: what toy/explore.py read from the runs.
"use strict";
const $ = id => document.getElementById(id);
const film = JSON.parse($("film").textContent), {sigmas, limit, runs} = film;
const unpack = text => new Int16Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const units = text => Float32Array.from(unpack(text), x => x / film.scale);
const points = units(film.points), noise = units(film.noise), shown = points.length;
const marks = [...new Set(runs.flatMap(run => run.rows.step))].sort((a, b) => a - b); // the frames of all runs
const last = marks.length - 1, longest = Math.max(...runs.map(run => run.steps));
const still = matchMedia("(prefers-reduced-motion: reduce)"), dark = matchMedia("(prefers-color-scheme: dark)");
let time = 0, level = 1, playing = false, before = 0; // time counts frames, and lies between two while it plays

const PANELS = [ // caption, and what it draws
  ["One-step samples", "<i class=grey></i>target <i class=orange></i>generator", (run, at, draw) => {
    draw.dots(run.data, "grey", 0);
    draw.dots(mix(run.samples, run.data.length, at), "orange", 0);
  }],
  ["Target", "the exact denoiser", (run, at, draw) => field(draw, run.data, run.target, "ink")],
  ["Teacher", "what it learned", (run, at, draw) => field(draw, run.data, run.teacher, "blue")],
  ["Online", "<i class=blue></i>teacher <i class=orange></i>online", (run, at, draw) => {
    draw.dots(mix(run.samples, run.data.length, at), "grey", sigmas[level]);
    draw.arrows(part(run.teacher), "blue");
    draw.arrows(part(mix(run.online, shown * sigmas.length, at)), "orange");
  }],
];
const CHARTS = [ // title, curves: [column, words, colour, dashes]
  ["Is it close? Energy distance", [["energy_distance", "generator", "orange", ""],
    ["floor", "perfect samples", "grey", "dashed"]]],
  ["Is the signal true? Score gaps", [["divergence", "generator − target", "ink", ""],
    ["gap", "online − teacher", "blue", "dashed"], ["fake_error", "online − generator", "orange", "dotted"]]],
  ["Is it stable? Gradient norms", [["generator_gradient", "generator", "orange", ""],
    ["fake_gradient", "online", "blue", "dashed"]]],
];

// ---- where we are
const round = x => x === null ? "none" : x >= 1e4 || (x > 0 && x < 1e-4) ? x.toExponential(1) : String(Number(x.toPrecision(2)));
const count = n => Math.round(n).toLocaleString("en");
const stepAt = t => {
  const k = Math.floor(t);
  return marks[k] + (t - k) * ((marks[k + 1] ?? marks[k]) - marks[k]);
};

function place(run) { // the frames of a run before and after now, and the share of the second
  const step = stepAt(time), steps = run.rows.step;
  const i = Math.max(0, steps.findLastIndex(s => s <= step)), next = Math.min(i + 1, steps.length - 1);
  return {i, next, share: next > i ? Math.max(0, (step - steps[i]) / (steps[next] - steps[i])) : 0};
}

function column(run, name) { // a curve's values: some are of a noise level
  if (name === "floor") return run.rows.step.map(() => run.floor);
  return run.rows[name] ?? run.rows[`${name}_${sigmas[level]}`];
}

// ---- panels
function mix(frames, size, {i, next, share}) { // in between, points move in straight lines
  const a = frames.subarray(i * size, (i + 1) * size), b = frames.subarray(next * size, (next + 1) * size);
  return share ? a.map((x, k) => x + share * (b[k] - x)) : a;
}
const part = fields => fields.subarray(level * shown, (level + 1) * shown);

function field(draw, cloud, fields, colour) {
  draw.dots(cloud, "grey", sigmas[level]);
  draw.arrows(part(fields), colour);
}

function brush(canvas) {
  const size = Math.round(canvas.clientWidth * devicePixelRatio), pen = canvas.getContext("2d");
  if (canvas.width !== size) canvas.width = canvas.height = size;
  pen.clearRect(0, 0, size, size);
  const style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(`--${name}`);
  const X = x => (x / limit + 1) * size / 2, Y = y => (1 - y / limit) * size / 2;
  return {
    dots(xy, name, sigma) {
      const r = Math.max(1.5, size / 220);
      pen.globalAlpha = sigma ? .4 : .6;
      pen.fillStyle = colour(name);
      for (let k = 0; k < xy.length; k += 2)
        pen.fillRect(X(xy[k] + sigma * noise[k]) - r / 2, Y(xy[k + 1] + sigma * noise[k + 1]) - r / 2, r, r);
    },
    arrows(ends, name) {
      pen.globalAlpha = .8;
      pen.strokeStyle = colour(name);
      pen.lineWidth = Math.max(.75, size / 420);
      pen.beginPath();
      for (let k = 0; k < ends.length; k += 2) {
        const [x, y, u, v] = [X(points[k]), Y(points[k + 1]), X(ends[k]), Y(ends[k + 1])];
        const length = Math.hypot(u - x, v - y), head = Math.min(length / 3, size / 60) / (length || 1);
        const [dx, dy] = [(u - x) * head, (v - y) * head];
        pen.moveTo(x, y); pen.lineTo(u, v);
        pen.moveTo(u - dx + dy / 2, v - dy - dx / 2); pen.lineTo(u, v); pen.lineTo(u - dx - dy / 2, v - dy + dx / 2);
      }
      pen.stroke();
    },
  };
}

// ---- curves
const along = step => Math.sqrt(Math.min(1, step / longest)); // as the log is spaced
const power = n => Math.abs(n) > 3 ? `1e${n}` : n < 0 ? (10 ** n).toFixed(-n) : String(10 ** n);

function chart(figure, run, curves) { // everything but where the cursor stands
  const svg = figure.querySelector("svg"), [L, R, T, B] = [38, svg.clientWidth - 10, 6, svg.clientHeight - 20];
  const logs = runs.flatMap(r => curves.flatMap(([name]) => column(r, name))).filter(v => v > 0).map(Math.log10);
  if (!logs.length) logs.push(0);
  const low = Math.floor(Math.min(...logs)), high = Math.max(low + 1, Math.ceil(Math.max(...logs)));
  const X = step => L + along(step) * (R - L), Y = log => T + (high - log) / (high - low) * (B - T);
  const text = (x, y, anchor, words) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`;
  const parts = [];
  for (let n = low; n <= high; n += Math.ceil((high - low) / 4))
    parts.push(`<path class="grid" d="M${L} ${Y(n)}H${R}"/>`, text(L - 5, Y(n) + 4, "end", power(n)));
  for (const share of R > 240 ? [0, 1 / 16, 1 / 4, 9 / 16, 1] : [0, 1 / 4, 1])
    parts.push(text(X(share * longest), B + 16, share === 1 ? "end" : "middle", count(share * longest)));
  for (const [name, , colour, dashes] of curves) {
    const values = column(run, name), known = [...values.keys()].filter(k => values[k] > 0);
    const places = known.map(k => `${X(run.rows.step[k]).toFixed(1)} ${Y(Math.log10(values[k])).toFixed(1)}`);
    if (known.length) parts.push(`<path class="${colour} ${dashes}" d="M${places.join("L")}"/>`);
  }
  svg.innerHTML = parts.join("") + `<line class="cursor" y1="${T}" y2="${B}"/>`;
  figure.move = step => ["x1", "x2"].forEach(end => svg.lastChild.setAttribute(end, X(step)));
  figure.stepOf = x => longest * Math.max(0, Math.min(1, (x - L) / (R - L))) ** 2;
}

// ---- the page
function sentence(run, i) {
  const at = name => column(run, name)[i], ended = i === run.rows.step.length - 1 && stepAt(time) > run.rows.step[i];
  return `${ended ? "Ended at step" : "Step"} ${count(at("step"))} of ${count(run.steps)}: energy distance `
    + `${round(at("energy_distance"))} (perfect samples ${round(run.floor)}), `
    + `${(100 * at("high_quality")).toFixed(1)} % within 3 std of a mode, `
    + `${at("modes_covered")} of ${at("modes")} modes. At σ\u00a0=\u00a0${sigmas[level]} online network and teacher are `
    + `${round(at("gap"))} apart, generator and target in truth ${round(at("divergence"))}.`;
}

const nearest = step => { // the frame that is closest on the curves' axis
  const away = marks.map(mark => Math.abs(along(mark) - along(step)));
  return away.indexOf(Math.min(...away));
};

function build(run) {
  for (const name of ["data", "target", "teacher", "samples", "online"]) run[name] = units(run[name]);
  const article = run.article = $("run").content.cloneNode(true).firstElementChild;
  const caption = (title, legend) => `<figcaption><b>${title}</b> <span class="level"></span><br>${legend}</figcaption>`;
  const key = ([, words, colour, dashes]) => `<span><i class="${colour} ${dashes}"></i>${words} <b></b></span>`;
  article.querySelector("h2").textContent = run.name;
  article.querySelector(".about").textContent = run.about;
  article.querySelector(".panels").innerHTML = PANELS.map(([title, legend]) =>
    `<figure><canvas role="img"></canvas>${caption(title, legend)}</figure>`).join("");
  article.querySelector(".charts").innerHTML = CHARTS.map(([title, curves]) =>
    `<figure>${caption(title, curves.map(key).join(" "))}<svg aria-hidden="true"></svg></figure>`).join("");
  run.canvases = [...article.querySelectorAll("canvas")];
  run.figures = [...article.querySelectorAll(".charts figure")];
  for (const figure of run.figures) {
    const svg = figure.querySelector("svg");
    svg.onpointerdown = svg.onpointermove = event => {
      if (event.buttons) seek(nearest(figure.stepOf(event.clientX - svg.getBoundingClientRect().left)));
    };
  }
  document.querySelector("main").append(article);
}

function layout() { // after a change of size, colours or noise level
  for (const run of runs) {
    run.figures.forEach((figure, k) => chart(figure, run, CHARTS[k][1]));
    run.figures[1].querySelector(".level").textContent = `σ ${sigmas[level]}`;
    run.canvases.forEach((canvas, k) => {
      if (k) canvas.nextElementSibling.querySelector(".level").textContent = `σ ${sigmas[level]}`;
      canvas.setAttribute("aria-label", `${run.name}: ${PANELS[k][0]}${k ? ` at σ = ${sigmas[level]}` : ""}`);
    });
  }
  render();
}

function render() {
  const step = stepAt(time);
  $("time").value = Math.floor(time);
  $("time").setAttribute("aria-valuetext", `step ${count(stepAt(Math.floor(time)))}`);
  $("step").textContent = `step ${count(step)}`;
  $("play").textContent = playing ? "Pause" : "Play";
  for (const run of runs) {
    const at = place(run), now = run.article.querySelector(".now"), text = sentence(run, at.i);
    now.setAttribute("aria-live", playing ? "off" : "polite"); // nobody can listen as fast as it plays
    if (now.textContent !== text) now.textContent = text;
    run.canvases.forEach((canvas, k) => PANELS[k][2](run, at, brush(canvas)));
    run.figures.forEach((figure, k) => {
      figure.move(step);
      figure.querySelectorAll("span b").forEach((b, c) => {
        b.textContent = round(column(run, CHARTS[k][1][c][0])[at.i]);
      });
    });
  }
}

function seek(t) {
  playing = false;
  time = Math.max(0, Math.min(last, Math.round(t)));
  render();
}

function play() {
  playing = !playing && last > 0;
  if (playing && time >= last) time = 0;
  if (!playing) return seek(time);
  before = performance.now();
  requestAnimationFrame(tick);
}

let owed = 0; // time that has not been shown, where motion is reduced
function tick(now) {
  if (!playing) return;
  owed += Math.max(0, now - before) / (still.matches ? 500 : 160); // a frame's time may lie before the key's
  before = now;
  const moved = still.matches ? Math.floor(owed) : owed;
  owed -= moved;
  time = Math.min(last, time + moved);
  if (time >= last) return seek(last);
  if (moved) render();
  requestAnimationFrame(tick);
}

addEventListener("keydown", event => {
  const {key, target} = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || target.type === "radio" && key.startsWith("Arrow")) return;
  if (key === " " && !target.closest("button, summary")) play();
  else if (target.id === "time") return; // a slider knows the others
  else if (key === "ArrowRight") seek(Math.floor(time) + 1);
  else if (key === "ArrowLeft") seek(Math.ceil(time) - 1);
  else if (key === "Home") seek(0);
  else if (key === "End") seek(last);
  else return;
  event.preventDefault();
});
$("time").max = last;
$("time").oninput = () => seek(+$("time").value);
$("play").onclick = play;
$("levels").insertAdjacentHTML("beforeend", sigmas.map((sigma, k) =>
  `<label><input type="radio" name="level" value="${k}" ${k === level ? "checked" : ""}>${sigma}</label>`).join(""));
$("levels").onchange = event => { level = +event.target.value; layout(); };
document.querySelector("main").classList.toggle("several", runs.length > 1);
runs.forEach(build);
dark.onchange = layout;
new ResizeObserver(layout).observe(document.querySelector("main"));
layout();
