"use strict";
const run = JSON.parse(document.getElementById("numbers").textContent);

// A figure: values at the pointer, a box to zoom into, Shift to move, a double click or the button to see all of it again.
function figure(place, panels) {
  const svg = place.querySelector("svg"), button = place.querySelector(".reset"), whole = svg.getAttribute("viewBox");
  const tip = document.createElement("div"), pointed = add("g"), band = add("rect", "band");
  let drag = null;
  tip.className = "tip";
  tip.hidden = true;
  place.append(tip);

  function add(name, kind, values = {}) {
    const element = document.createElementNS(svg.namespaceURI, name);
    if (kind) element.setAttribute("class", kind);
    for (const [key, value] of Object.entries(values)) element.setAttribute(key, value);
    return svg.appendChild(element);
  }
  const at = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());

  function show(view) {
    svg.setAttribute("viewBox", view);
    button.hidden = view === whole;
    hide();
  }

  function hide() {
    tip.hidden = true;
    pointed.replaceChildren();
  }

  // Of each series the nearest point across, of marks and cells the nearest one in reach.
  function near({ box: [left, top, right, bottom], reach, series }, { x, y }) {
    if (x < left - 3 || x > right + 3 || y < top - 3 || y > bottom + 3) return [];
    const [wide, high] = reach ? [reach[0] * (right - left), reach[1] * (bottom - top)] : [Infinity, Infinity];
    const found = series.flatMap((one) => {
      let best = null;
      one.x.forEach((px, i) => {
        const across = Math.abs(px - x), down = Math.abs(one.y[i] - y), far = reach ? Math.hypot(across, down) : across;
        if (across <= wide && down <= high && !(best?.far <= far)) best = { far, x: px, y: one.y[i], words: `${one.name}, ${one.text[i]}` };
      });
      return best ?? [];
    });
    const least = Math.min(...found.map((point) => point.far));
    return reach ? found.filter((point) => point.far === least).slice(0, 1) : found.filter((point) => point.far <= least + 4);
  }

  function point(event) {
    const found = panels.flatMap((panel) => near(panel, at(event)));
    hide();
    if (!found.length) return;
    for (const { x, y } of found) pointed.append(add("circle", "mark", { cx: x, cy: y, r: 3.5 }));
    tip.textContent = found.map(({ words }) => words).join("\n");
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, document.documentElement.clientWidth - width - 4)) + "px";
    tip.style.top = (event.clientY > height + 20 ? event.clientY - height - 14 : event.clientY + 18) + "px";
  }

  const boxed = (from, to) => [Math.min(from.x, to.x), Math.min(from.y, to.y), Math.abs(to.x - from.x), Math.abs(to.y - from.y)];
  function outline(box) {
    ["x", "y", "width", "height"].forEach((key, i) => band.setAttribute(key, box[i]));
  }

  svg.addEventListener("pointerdown", (event) => {
    // A finger that drags over a figure means to scroll the page.
    if (event.pointerType === "touch") return point(event);
    if (event.button) return;
    event.preventDefault();
    svg.setPointerCapture(event.pointerId);
    drag = at(event);
    hide();
  });
  svg.addEventListener("pointermove", (event) => {
    if (!drag) return point(event);
    const here = at(event);
    if (!event.shiftKey) return outline(boxed(drag, here));
    const [x, y, ...size] = svg.getAttribute("viewBox").split(" ").map(Number);
    show([x + drag.x - here.x, y + drag.y - here.y, ...size].join(" "));
  });
  svg.addEventListener("pointerup", (event) => {
    const box = drag && !event.shiftKey ? boxed(drag, at(event)) : [0, 0, 0, 0];
    drag = null;
    outline([0, 0, 0, 0]);
    if (box[2] > 5 && box[3] > 5) show(box.join(" "));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("dblclick", () => show(whole));
  button.addEventListener("click", () => show(whole));
}
for (const [name, panels] of Object.entries(run.figures)) figure(document.getElementById(name), panels);
