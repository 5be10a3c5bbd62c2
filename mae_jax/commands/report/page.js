"use strict";
// Figures over steps: one at a time, by a slider.
for (const box of document.querySelectorAll(".steps")) {
  const shown = [...box.querySelectorAll("figure")];
  if (shown.length < 2) continue;
  const slider = Object.assign(document.createElement("input"), {type: "range", min: 0, max: shown.length - 1});
  slider.setAttribute("aria-label", "Step");
  const said = document.createElement("output");
  const show = () => {
    shown.forEach((figure, k) => { figure.hidden = k !== Number(slider.value); });
    said.textContent = shown[slider.value].querySelector("figcaption").textContent;
  };
  slider.value = shown.length - 1;
  slider.addEventListener("input", show);
  for (const figure of shown) figure.querySelector("figcaption").hidden = true;
  const line = Object.assign(document.createElement("div"), {className: "slider"});
  line.append(slider, said);
  shown[0].before(line);
  show();
}

// The map. Text of names and labels is set as textContent alone, so that nothing in it is markup.
function map(data) {
  const $ = id => document.getElementById(id);
  const numbers = (text, kind) => new kind(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
  const label = numbers(data.label, Uint32Array), split = numbers(data.split, Uint32Array);
  const near = numbers(data.neighbors, Uint32Array), cosines = numbers(data.cosines, Int16Array);
  const n = data.files.length, k = data.k, side = data.side;
  const lower = data.files.map(name => name.toLowerCase());
  const colors = data.labels.map((_, i) => i < 10 && data.labels.length <= 10
    ? ["#4285d6", "#d9822b", "#2f9e72", "#b8519f", "#c94a44", "#7a6bd0", "#97783a", "#3aa6b9", "#a3a829", "#7f8792"][i]
    : `hsl(${(i * 137.5) % 360} 60% ${48 + (i % 3) * 7}%)`);
  const canvas = $("canvas"), context = canvas.getContext("2d"), tip = $("tip"), panel = $("panel");

  const sheets = data.sheets.map(uri => Object.assign(new Image(), {src: uri}));
  const perSheet = data.columns * data.columns;
  function drawThumb(into, i, x, y, size) {
    const place = i % perSheet, sheet = sheets[Math.floor(i / perSheet)];
    if (!sheet.complete) return;
    into.drawImage(sheet, place % data.columns * side, Math.floor(place / data.columns) * side, side, side, x, y, size, size);
  }
  function thumb(i, size) {
    const element = Object.assign(document.createElement("canvas"), {className: "thumb", width: side * 2, height: side * 2});
    element.style.width = element.style.height = `${size}px`;
    drawThumb(element.getContext("2d"), i, 0, 0, side * 2);
    return element;
  }

  // Places of each projection in [-1, 1], one scale for both axes; NaN for images that it leaves out.
  const projections = data.projections.map(({name, places, of}) => {
    const found = numbers(places, Float32Array), which = of && numbers(of, Uint32Array), count = found.length / 2;
    const x = new Float32Array(n).fill(NaN), y = new Float32Array(n).fill(NaN);
    const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
    for (let j = 0; j < count * 2; j++) {
      low[j % 2] = Math.min(low[j % 2], found[j]);
      high[j % 2] = Math.max(high[j % 2], found[j]);
    }
    const reach = Math.max(high[0] - low[0], high[1] - low[1], 1e-9) / 2;
    for (let j = 0; j < count; j++) {
      const i = which ? which[j] : j;
      x[i] = (found[2 * j] - (low[0] + high[0]) / 2) / reach;
      y[i] = -(found[2 * j + 1] - (low[1] + high[1]) / 2) / reach;
    }
    return {name, x, y};
  });

  let {x, y} = projections[projections.length - 1];
  let view, width = 0, height = 0, hovered = -1, chosen = -1, drawn = [], layoutOf = "";
  const matches = new Uint8Array(n).fill(1);
  const fit = () => { view = {scale: 0.46 * Math.min(width, height), x: width / 2, y: height / 2}; };
  const screen = i => [x[i] * view.scale + view.x, y[i] * view.scale + view.y];
  const thumbSide = () => Math.min(side, Math.max(26, 26 * Math.sqrt(view.scale / (0.46 * Math.min(width, height)))
    * Math.max(1, Math.sqrt(400 / n))));

  // Which images have a thumbnail at this scale: those that fit beside the earlier ones; the others are dots.
  function layout() {
    const size = thumbSide() + 3, key = `${view.scale} ${size}`;
    if (key === layoutOf) return;
    layoutOf = key;
    drawn = [];
    const cells = new Map();
    for (let j = 0; j < n; j++) {
      const i = j * 7919 % n;  // a prime: labels in the order of files would else have all the room
      if (!matches[i] || Number.isNaN(x[i])) continue;
      const px = x[i] * view.scale, py = y[i] * view.scale, cx = Math.floor(px / size), cy = Math.floor(py / size);
      let free = true;
      for (let dx = -1; dx <= 1 && free; dx++) for (let dy = -1; dy <= 1 && free; dy++) {
        const other = cells.get(`${cx + dx} ${cy + dy}`);
        free = other === undefined || Math.abs(other[0] - px) >= size || Math.abs(other[1] - py) >= size;
      }
      if (!free) continue;
      cells.set(`${cx} ${cy}`, [px, py]);
      drawn.push(i);
    }
  }

  function tile(i, size, color, line) {
    const [px, py] = screen(i);
    if (px < -size || py < -size || px > width + size || py > height + size) return;
    context.fillStyle = color;
    context.fillRect(px - size / 2 - line, py - size / 2 - line, size + 2 * line, size + 2 * line);
    drawThumb(context, i, px - size / 2, py - size / 2, size);
  }

  function draw() {
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink");
    const dim = style.getPropertyValue("--line"), ratio = window.devicePixelRatio || 1, size = thumbSide();
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    for (const on of [0, 1]) for (let i = 0; i < n; i++) {
      if (matches[i] !== on || Number.isNaN(x[i])) continue;
      const [px, py] = screen(i);
      if (px < 0 || py < 0 || px > width || py > height) continue;
      context.fillStyle = on ? colors[label[i]] : dim;
      context.fillRect(px - 1.5, py - 1.5, 3, 3);
    }
    layout();
    context.globalAlpha = chosen < 0 ? 1 : 0.35;
    for (const i of drawn) tile(i, size, colors[label[i]], 1.5);
    context.globalAlpha = 1;
    if (chosen >= 0 && !Number.isNaN(x[chosen])) {
      const others = [...near.subarray(chosen * k, (chosen + 1) * k)].filter(i => !Number.isNaN(x[i]));
      context.strokeStyle = ink;
      context.lineWidth = 1;
      context.beginPath();
      for (const i of others) { context.moveTo(...screen(chosen)); context.lineTo(...screen(i)); }
      context.stroke();
      for (const i of others.reverse()) tile(i, size, colors[label[i]], 2);
      tile(chosen, size * 1.4, ink, 2.5);
    }
    if (hovered >= 0) tile(hovered, size * 1.25, ink, 2);
  }
  let waiting = false;
  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }

  function at(px, py) {
    const reach = thumbSide() / 2, tiles = new Set(drawn);
    let best = -1, least = Infinity;
    for (let i = 0; i < n; i++) {
      if (!matches[i] && i !== chosen) continue;
      const [qx, qy] = screen(i), away = Math.max(Math.abs(px - qx), Math.abs(py - qy));
      const reached = tiles.has(i) ? reach : 5;
      if (away <= reached && away < least) { least = away; best = i; }
    }
    return best;
  }

  // Text beside the map.
  const element = (name, text, kind = "") => Object.assign(document.createElement(name), {textContent: text, className: kind});
  function caption(i) {
    const box = document.createElement("div"), said = element("small", ` ${data.labels[label[i]]}`), key = element("i", "", "key");
    key.style.background = colors[label[i]];
    said.prepend(key);
    box.append(element("span", data.files[i]), said);
    if (data.splits.length > 1) box.append(element("small", data.splits[split[i]]));
    return box;
  }
  function list(title, entries) {
    const items = document.createElement("ul");
    for (const [i, note] of entries) {
      const button = element("button", "");
      button.type = "button";
      button.title = data.files[i];
      const said = element("small", note), key = element("i", "", "key");
      key.style.background = colors[label[i]];
      said.prepend(key);
      button.append(thumb(i, 72), element("span", data.files[i].split("/").pop()), said);
      button.addEventListener("click", () => choose(i, true));
      items.append(document.createElement("li"));
      items.lastChild.append(button);
    }
    panel.append(element("h3", title), items);
  }
  function tell() {
    panel.replaceChildren();
    if (chosen >= 0) {
      const box = element("div", "", "chosen");
      box.append(thumb(chosen, 128), caption(chosen));
      panel.append(box);
      list("Nearest by features", Array.from({length: k}, (_, j) => [near[chosen * k + j], (cosines[chosen * k + j] / 10000).toFixed(4)]));
    } else {
      const found = [];
      for (let i = 0; i < n && found.length < 24; i++) if (matches[i]) found.push([i, data.labels[label[i]]]);
      list(found.length ? "Click an image for its neighbors" : "No image has such a name and label", found);
    }
  }
  function choose(i, move) {
    chosen = i;
    if (move && i >= 0 && !Number.isNaN(x[i])) {
      const [px, py] = screen(i);
      if (px < 20 || py < 20 || px > width - 20 || py > height - 20) { view.x += width / 2 - px; view.y += height / 2 - py; }
    }
    tell();
    redraw();
  }

  // Controls.
  function filter() {
    const wanted = $("search").value.trim().toLowerCase(), only = $("label").value;
    let count = 0;
    for (let i = 0; i < n; i++) {
      matches[i] = (only === "" || label[i] === Number(only)) && lower[i].includes(wanted);
      count += matches[i];
    }
    $("count").textContent = `${count.toLocaleString("en")} of ${n.toLocaleString("en")}`;
    layoutOf = "";
    choose(-1);
  }
  const totals = new Array(data.labels.length).fill(0);
  for (const each of label) totals[each]++;
  $("label").append(new Option("all", ""), ...data.labels.map((name, i) => new Option(`${name} (${totals[i].toLocaleString("en")})`, i)));
  $("label").addEventListener("change", filter);
  $("search").addEventListener("input", filter);
  $("controls").addEventListener("submit", event => event.preventDefault());
  const choices = projections.map(each => {
    const button = element("button", each.name);
    button.type = "button";
    button.setAttribute("role", "radio");
    button.addEventListener("click", () => project(each));
    return button;
  });
  $("projections").append(...choices);
  function project(each) {
    ({x, y} = each);
    choices.forEach((button, j) => button.setAttribute("aria-checked", projections[j] === each));
    layoutOf = "";
    fit();
    redraw();
  }
  function zoom(factor, px = width / 2, py = height / 2) {
    const scale = Math.min(Math.max(view.scale * factor, 0.2 * Math.min(width, height)), 400 * Math.min(width, height));
    factor = scale / view.scale;
    view = {scale, x: px + (view.x - px) * factor, y: py + (view.y - py) * factor};
    redraw();
  }
  $("in").addEventListener("click", () => zoom(1.5));
  $("out").addEventListener("click", () => zoom(1 / 1.5));
  $("fit").addEventListener("click", () => { fit(); redraw(); });

  // Mouse, pen and fingers: one moves, two zoom, one that stays chooses.
  const held = new Map();
  let moved = 0;
  const inside = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", event => {
    held.set(event.pointerId, inside(event));
    canvas.setPointerCapture(event.pointerId);
    if (held.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", event => {
    const here = inside(event), before = held.get(event.pointerId);
    if (!before) return hover(...here);
    const other = [...held].find(([id]) => id !== event.pointerId);
    moved += Math.hypot(here[0] - before[0], here[1] - before[1]);
    if (other) {
      const apart = p => Math.max(Math.hypot(p[0] - other[1][0], p[1] - other[1][1]), 1);
      zoom(apart(here) / apart(before), (here[0] + other[1][0]) / 2, (here[1] + other[1][1]) / 2);
    } else if (moved > 4) {
      view.x += here[0] - before[0];
      view.y += here[1] - before[1];
      canvas.classList.add("moved");
      tip.hidden = true;
      redraw();
    }
    held.set(event.pointerId, here);
  });
  const release = event => {
    if (held.delete(event.pointerId) && event.type === "pointerup" && moved <= 4) choose(at(...inside(event)));
    if (!held.size) canvas.classList.remove("moved");
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => hover(-1e9, 0));
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...inside(event));
  }, {passive: false});
  canvas.addEventListener("keydown", event => {
    const by = {ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40]}[event.key];
    if (by) { view.x += by[0]; view.y += by[1]; redraw(); event.preventDefault(); }
    if (event.key === "+" || event.key === "=") zoom(1.3);
    if (event.key === "-") zoom(1 / 1.3);
    if (event.key === "Escape") choose(-1);
  });
  function hover(px, py) {
    const found = at(px, py);
    if (found !== hovered) {
      hovered = found;
      canvas.classList.toggle("over", found >= 0);
      tip.hidden = found < 0;
      if (found >= 0) tip.replaceChildren(thumb(found, 96), caption(found));
      redraw();
    }
    if (found >= 0) {
      tip.style.left = `${Math.min(px + 16, Math.max(width - tip.offsetWidth - 6, 0))}px`;
      tip.style.top = `${py + tip.offsetHeight + 24 < height ? py + 16 : Math.max(py - tip.offsetHeight - 16, 0)}px`;
    }
  }

  new ResizeObserver(() => {
    const first = !width, ratio = window.devicePixelRatio || 1, before = [width, height];
    ({clientWidth: width, clientHeight: height} = canvas);
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    if (first) fit(); else { view.x += (width - before[0]) / 2; view.y += (height - before[1]) / 2; }
    draw();
  }).observe(canvas);
  ({clientWidth: width, clientHeight: height} = canvas);
  project(projections[projections.length - 1]);
  filter();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  Promise.allSettled(sheets.map(sheet => sheet.decode())).then(() => {
    draw();
    tell();
    document.documentElement.dataset.ready = Math.round(performance.now());  // milliseconds until all is there
  });
}
const stored = document.getElementById("map-data");
if (stored) map(JSON.parse(stored.textContent));
