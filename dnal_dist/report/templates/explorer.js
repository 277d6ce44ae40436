
// The explorer: `at` is the number of the state that is shown. What is written here by script is what Python wrote for the last state.
const states = run.explorer;
let at = states ? states.frames.length - 1 : 0;
const byId = (id) => document.getElementById(id);
const comma = (count) => count.toLocaleString("en-US");
const open = (site) => states.frames[at].open[site];
const all = (site) => states.channels[site];
const undecided = (site) => states.frames[at].undecided?.[site] ?? 0;
const share = (site) => open(site) / Math.max(all(site), 1);
const possible = (site) => (open(site) + undecided(site)) / Math.max(all(site), 1);
// Neither one channel of many is none, nor all but one of many all.
const percent = (site) =>
  Math.min(Math.max(Math.round(100 * share(site)), Math.min(open(site), 1)), open(site) < all(site) ? 99 : 100) + "\u00a0%";

function told({ name, sites }) {
  const words = (site, what) =>
    `${comma(open(site))} of ${comma(all(site))} ${what}` + (undecided(site) ? `, ${comma(undecided(site))} undecided` : "");
  if (sites.length === 1) return `${name}: ${words(sites[0], "channels")}`;
  return `${name}: ${words(sites[0], "hidden channels")}; ${words(sites.at(-1), "output channels")}`;
}

// A rectangle amid its outline; the least of it is still seen.
function resize(rect, { x, y, width, height }, shares) {
  const down = shares[0], across = shares.length > 1 ? shares.at(-1) : 1, seen = down > 0 && across > 0;
  const wide = seen ? Math.max(width * across, 1.5) : 0, high = seen ? Math.max(height * down, 1.5) : 0;
  const place = { x: x + (width - wide) / 2, y: y + (height - high) / 2, width: wide, height: high };
  for (const [key, value] of Object.entries(place)) rect.setAttribute(key, value.toFixed(2));
}

// The image of the network; gives the function that draws the state at hand.
function networkImage() {
  const boxes = [...document.querySelectorAll(".network .box")].map((group) => {
    const [hull, pale, fill, title, count] = [".hull", ".pale", ".fill", "title", ".count"].map((part) => group.querySelector(part));
    const place = Object.fromEntries(["x", "y", "width", "height"].map((key) => [key, Number(hull.getAttribute(key))]));
    return { group, name: group.dataset.name, sites: group.dataset.sites.split(" ").map(Number), place, pale, fill, title, count };
  });
  let pointed = null;
  function point(box) {
    pointed = box;
    byId("readout").textContent = told(box);
  }
  // One stop of the tab key for the whole image; the arrows go on from there.
  boxes.forEach(({ group }, i) => {
    group.tabIndex = i ? -1 : 0;
    group.addEventListener("pointerenter", () => point(boxes[i]));
    group.addEventListener("focus", () => point(boxes[i]));
    group.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = { Home: 0, End: boxes.length - 1 }[event.key] ?? (by && Math.min(Math.max(i + by, 0), boxes.length - 1));
      if (next === undefined) return;
      event.preventDefault();
      group.tabIndex = -1;
      boxes[next].group.tabIndex = 0;
      boxes[next].group.focus();
    });
  });
  return () => {
    for (const box of boxes) {
      resize(box.pale, box.place, box.sites.map(possible));
      resize(box.fill, box.place, box.sites.map(share));
      box.group.classList.toggle("closed", !box.sites.every(possible));
      box.title.textContent = told(box);
      if (box.count) box.count.textContent = comma(open(box.sites[0]));
    }
    if (pointed) point(pointed);
  };
}

// The histogram of a site's gates, as Python draws it.
function strip(counts) {
  const total = counts.reduce((sum, count) => sum + count, 0) || 1;
  return counts.map((count, i) => {
    const height = Math.max(20 * Math.sqrt(count / total), 1.5).toFixed(1);
    return count > 0 ? `M${10 * i + 1} 20v${-height}h8v${height}z` : "";
  }).join("");
}

function drawRow(row) {
  const site = Number(row.dataset.site), { counts } = states.frames[at];
  const [channels, fate, path] = [".channels", ".share", ".gates path"].map((part) => row.querySelector(part));
  const rescued = at === states.frames.length - 1 && "rescued" in row.dataset;
  row.querySelector(".bar i").style.width = 100 * share(site) + "%";
  row.querySelector(".bar b").style.width = 100 * (possible(site) - share(site)) + "%";
  channels.textContent = `${comma(open(site))} of ${comma(all(site))}`;
  channels.dataset.value = open(site);
  fate.textContent = rescued ? "rescued" : possible(site) ? percent(site) : "closed";
  fate.classList.toggle("flag", rescued);
  fate.dataset.value = share(site);
  row.dataset.state = !possible(site) ? "closed" : open(site) < all(site) ? "thinned" : "whole";
  if (path) path.setAttribute("d", counts ? strip(counts[site]) : "");
}

function sort(head, rows) {
  const heads = [...head.parentNode.children], column = heads.indexOf(head), text = head.dataset.sort === "text";
  // Of numbers, the largest are looked for first; the third time brings back the network's order.
  const order = text ? ["ascending", "descending"] : ["descending", "ascending"];
  const next = order[order.indexOf(head.getAttribute("aria-sort")) + 1];
  heads.forEach((one) => one.removeAttribute("aria-sort"));
  const value = (row) => row.children[column].dataset.value;
  const compare = (a, b) => (text ? value(a).localeCompare(value(b), "en", { numeric: true }) : Number(value(a)) - Number(value(b)));
  const sorted = [...rows];
  if (next) {
    head.setAttribute("aria-sort", next);
    sorted.sort((a, b) => (next === "ascending" ? compare(a, b) : compare(b, a)));
  }
  document.querySelector(".layers tbody").append(...sorted);
}

// The table of layers; gives the function that writes the state at hand.
function table() {
  const rows = [...document.querySelectorAll(".layers tbody tr")];
  function filter() {
    if (!byId("filter")) return;
    const part = byId("filter").value.trim().toLowerCase(), state = byId("state").value;
    for (const row of rows) {
      const named = row.querySelector("th").dataset.value.toLowerCase().includes(part);
      row.hidden = !named || (state !== "" && row.dataset.state !== state);
    }
    const left = rows.filter((row) => !row.hidden).length;
    const words = left === rows.length ? "" : `${comma(left)} of ${comma(rows.length)} layers`;
    // A reader of the screen is told of changes alone.
    if (byId("shown").textContent !== words) byId("shown").textContent = words;
  }
  for (const head of document.querySelectorAll('.layers thead [data-sort]:not([data-sort=""])')) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head, rows));
    head.replaceChildren(button);
  }
  byId("filter")?.addEventListener("input", filter);
  byId("state")?.addEventListener("change", filter);
  return () => {
    rows.filter((row) => "site" in row.dataset).forEach(drawRow);
    filter();
  };
}

// The slider, and what moves it by itself.
function play(show) {
  const slider = byId("position"), button = byId("play"), last = states.frames.length - 1;
  let timer = null;
  function turn(plays) {
    clearInterval(timer);
    // Whoever asked for little motion gets single images.
    const slow = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const pause = slow ? 1000 : Math.min(Math.max(8000 / (last + 1), 60), 500);
    timer = plays ? setInterval(() => (at < last ? show(at + 1) : turn(false)), pause) : null;
    button.textContent = plays ? "Pause" : "Play";
    button.setAttribute("aria-label", `${button.textContent} the search`);
  }
  slider.addEventListener("input", () => {
    if (timer) turn(false);
    show(Number(slider.value));
  });
  button.addEventListener("click", () => {
    if (!timer && at === last) show(0);
    turn(!timer);
  });
}

function explore() {
  const slider = byId("position"), draw = networkImage(), write = table();
  function show(state) {
    at = state;
    if (slider) {
      slider.value = at;
      slider.setAttribute("aria-valuetext", states.frames[at].words);
      byId("words").textContent = states.frames[at].words;
    }
    draw();
    write();
  }
  for (const part of document.querySelectorAll(".slider, .filter")) part.hidden = false;
  if (slider) play(show);
  // A browser that goes back to the page may remember where the slider stood.
  show(at);
}
if (states) explore();
