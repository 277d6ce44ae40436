
function explore() {
  const { channels, frames } = run.explorer;
  const byId = (id) => document.getElementById(id);
  const slider = byId("position"), words = byId("words"), play = byId("play"), readout = byId("readout");
  const boxes = [...document.querySelectorAll(".network .box")].map((group) => ({
    group, name: group.dataset.name, sites: group.dataset.sites.split(" ").map(Number), title: group.querySelector("title"),
    hull: Object.fromEntries(["x", "y", "width", "height"].map((key) => [key, Number(group.querySelector(".hull").getAttribute(key))])),
    fill: group.querySelector(".fill"), count: group.querySelector(".count"),
  }));
  const rows = [...document.querySelectorAll(".layers tbody tr[data-site]")].map((row) => ({
    row, site: Number(row.dataset.site), bar: row.querySelector(".bar i"), channels: row.querySelector(".channels"),
    share: row.querySelector(".share"), strip: row.querySelector(".gates path"),
  }));
  const comma = (count) => count.toLocaleString("en-US");
  // Neither one channel of many is none, nor all but one of many all.
  const percent = (share) => Math.min(Math.max(Math.round(100 * share), 1), share < 1 ? 99 : 100) + "\u00a0%";
  let at = frames.length - 1, shown = null;

  function bars(counts) {
    const total = counts.reduce((sum, count) => sum + count, 0) || 1;
    return counts.map((count, i) => {
      const height = Math.max(20 * Math.sqrt(count / total), 1.5).toFixed(1);
      return count > 0 ? `M${10 * i + 1} 20v${-height}h8v${height}z` : "";
    }).join("");
  }

  function told({ name, sites }) {
    const counts = sites.map((site) => `${comma(frames[at].open[site])} of ${comma(channels[site])}`);
    if (counts.length === 1) return `${name}: ${counts[0]} channels`;
    return `${name}: ${counts[0]} hidden channels, ${counts.at(-1)} output channels`;
  }

  function drawBox(box) {
    const { x, y, width, height } = box.hull, open = frames[at].open;
    const shares = box.sites.map((site) => open[site] / Math.max(channels[site], 1));
    const down = shares[0], across = shares.length > 1 ? shares.at(-1) : 1;
    // So that one channel of many is still seen.
    const wide = Math.max(width * across, 1.5), high = Math.max(height * down, 1.5);
    const place = { x: x + (width - wide) / 2, y: y + (height - high) / 2, width: wide, height: high };
    for (const [key, value] of Object.entries(place)) box.fill.setAttribute(key, value.toFixed(2));
    box.group.classList.toggle("closed", !box.sites.every((site) => open[site]));
    box.title.textContent = told(box);
    if (box.count) box.count.textContent = comma(open[box.sites[0]]);
  }

  function drawRow({ row, site, bar, channels: cell, share: fate, strip }) {
    const left = frames[at].open[site], share = left / Math.max(channels[site], 1), counts = frames[at].counts;
    const rescued = at === frames.length - 1 && "rescued" in row.dataset;
    bar.style.width = 100 * share + "%";
    cell.textContent = `${comma(left)} of ${comma(channels[site])}`;
    cell.dataset.value = left;
    fate.textContent = rescued ? "rescued" : left ? percent(share) : "closed";
    fate.classList.toggle("flag", rescued);
    fate.dataset.value = share;
    if (strip) strip.setAttribute("d", counts ? bars(counts[site]) : "");
  }

  function show(position) {
    at = Math.min(Math.max(position, 0), frames.length - 1);
    slider.value = at;
    slider.setAttribute("aria-valuetext", frames[at].words);
    words.textContent = frames[at].words;
    boxes.forEach(drawBox);
    rows.forEach(drawRow);
    if (shown) readout.textContent = told(shown);
    filter();
  }

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    play.setAttribute("aria-label", "Play the search");
  }
  function start() {
    if (at === frames.length - 1) show(0);
    // Whoever asked for little motion gets single pictures.
    const pause = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : Math.min(Math.max(8000 / frames.length, 60), 500);
    timer = setInterval(() => (at < frames.length - 1 ? show(at + 1) : stop()), pause);
    play.textContent = "Pause";
    play.setAttribute("aria-label", "Pause the search");
  }

  // One stop of the tab key for the whole picture; the arrows go on from there.
  function point(box) {
    shown = box;
    readout.textContent = told(box);
  }
  boxes.forEach((box, i) => {
    box.group.tabIndex = i ? -1 : 0;
    box.group.addEventListener("pointerenter", () => point(box));
    box.group.addEventListener("focus", () => point(box));
    box.group.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = { Home: 0, End: boxes.length - 1 }[event.key] ?? (by && Math.min(Math.max(i + by, 0), boxes.length - 1));
      if (next === undefined) return;
      event.preventDefault();
      box.group.tabIndex = -1;
      boxes[next].group.tabIndex = 0;
      boxes[next].group.focus();
    });
  });

  const isState = {
    closed: (share) => share === 0, thinned: (share) => share > 0 && share < 1, whole: (share) => share === 1,
  };
  const every = [...document.querySelectorAll(".layers tbody tr")];
  function filter() {
    if (!byId("filter")) return;
    const part = byId("filter").value.trim().toLowerCase(), state = byId("state").value;
    for (const row of every) {
      const named = row.querySelector("th").dataset.value.toLowerCase().includes(part);
      row.hidden = !named || (state !== "" && !isState[state](Number(row.querySelector(".share").dataset.value)));
    }
    const left = every.filter((row) => !row.hidden).length;
    const told = left === every.length ? "" : `${comma(left)} of ${comma(every.length)} layers`;
    if (byId("shown").textContent !== told) byId("shown").textContent = told;
  }

  function sort(head, button) {
    const before = head.getAttribute("aria-sort");
    const heads = [...head.parentNode.children], column = heads.indexOf(head);
    // Of numbers, the largest are looked for first; the third time brings back the network's order.
    const order = head.dataset.sort === "text" ? ["ascending", "descending"] : ["descending", "ascending"];
    const next = order[order.indexOf(before) + 1];
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    const value = (row) => row.children[column].dataset.value;
    const compare = head.dataset.sort === "text"
      ? (a, b) => value(a).localeCompare(value(b), "en", { numeric: true })
      : (a, b) => Number(value(a)) - Number(value(b));
    const sorted = [...every];
    if (next) {
      head.setAttribute("aria-sort", next);
      sorted.sort((a, b) => (next === "ascending" ? compare(a, b) : compare(b, a)));
    }
    document.querySelector(".layers tbody").append(...sorted);
  }

  for (const head of document.querySelectorAll(".layers thead [data-sort]")) {
    if (!head.dataset.sort) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head, button));
    head.replaceChildren(button);
  }
  for (const part of document.querySelectorAll(".slider, .filter")) part.hidden = false;
  byId("filter")?.addEventListener("input", filter);
  byId("state")?.addEventListener("change", filter);
  if (slider) {
    slider.addEventListener("input", () => {
      if (timer) stop();
      show(Number(slider.value));
    });
    play.addEventListener("click", () => (timer ? stop() : start()));
    // A browser that goes back to the page may remember where the slider stood.
    show(at);
  }
}
if (run.explorer) explore();
