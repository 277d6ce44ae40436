"use strict";
const run = JSON.parse(document.getElementById("numbers").textContent);
const FONT = "system-ui, sans-serif";
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
// Plotly reads a little HTML in its labels, and names come from the run.
const plain = (words) => words.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const line = ([x, y], name, more) => ({ type: "scatter", mode: "lines", x, y, name, ...more });
const diamond = () => ({ symbol: "diamond", size: 11, color: colour("second") });
const axis = (more) => ({ gridcolor: colour("grid"), linecolor: colour("rule"), zeroline: false, tickangle: 0, ...more });
const title = (text, standoff) => ({ title: { text, standoff } });

function layout(height, top, more) {
  return {
    height, margin: { l: 62, r: 14, t: top, b: 46 },
    font: { family: FONT, size: 12, color: colour("muted") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("rule"), font: { family: FONT, color: colour("ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
    showlegend: false,
    // A finger that drags over a figure means to scroll the page.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...more,
  };
}

function curves() {
  const data = [];
  for (const [key, yaxis, form] of [["accuracy", "y", "%{y:.2%}"], ["cross_entropy", "y2", "%{y:.4f}"]]) {
    const shared = { yaxis, hovertemplate: form };
    const { train, held_out, prune } = run.curves[key];
    data.push(line(train, "training batches", { ...shared, line: { color: colour("faint"), width: 1.5 } }));
    const dots = held_out[0].length < 100 ? { mode: "lines+markers", marker: { size: 5 } } : {};
    data.push(line(held_out, "held-out pictures", { ...shared, ...dots, line: { color: colour("accent"), width: 2 } }));
    if (prune[0].length) data.push(line(prune, "after pruning", { ...shared, mode: "markers", marker: diamond() }));
  }
  const dotted = { color: colour("second"), width: 1.25, dash: "dot" };
  if (run.curves.loss[0].length) {
    data.push(line(run.curves.loss, "training loss with penalty", { yaxis: "y2", hovertemplate: "%{y:.4f}", line: dotted }));
  }
  const losses = ["train", "held_out"].flatMap((which) => run.curves.cross_entropy[which][1]).filter((loss) => loss > 0);
  const decades = Math.log10(Math.max(...losses) / Math.min(...losses)) > 1.5;
  const ticks = [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3].flatMap((power) =>
    (decades ? [1] : [1, 2, 5]).map((digit) => Number(digit + "e" + power)));
  const end = Math.max(0, ...run.phases.map(([, , last]) => last));
  const bands = run.phases.map(([, x0, x1], i) => ({
    type: "rect", layer: "below", x0, x1, yref: "paper", y0: 0, y1: 1, line: { width: 0 },
    fillcolor: colour(i % 2 ? "band-odd" : "band-even"),
  }));
  // A band too narrow for its name, at about 6 pixels a letter, is named in the note above the figure.
  const pixels = (document.getElementById("curves").clientWidth - 76) / end;
  const names = run.phases.filter(([name, x0, x1]) => pixels * (x1 - x0) > 5.8 * name.length).map(([name, x0, x1]) => ({
    text: plain(name), x: (x0 + x1) / 2, y: 1, yref: "paper", yanchor: "bottom", showarrow: false,
  }));
  return [data, layout(520, 40, {
    hovermode: "x unified", shapes: bands, annotations: names,
    xaxis: axis({ anchor: "y2", tickformat: ",d", range: [-0.006 * end, 1.006 * end], ...title("iterations") }),
    yaxis: axis({ domain: [0.53, 1], tickformat: ".0%", ...title("accuracy", 8) }),
    yaxis2: axis({ domain: [0, 0.47], type: "log", tickvals: ticks, ticktext: ticks.map(String), ...title("cross-entropy", 8) }),
  })];
}

function search() {
  const { edges, epochs, delta, counts, threshold, open, macs, full, compact } = run.search;
  const bins = counts[0].length;
  const byBin = Array.from({ length: bins }, (_, bin) => counts.map((column) => column[bin]));
  const most = Math.max(10, ...counts.flat());
  const powers = Array.from({ length: Math.floor(Math.log10(most)) + 1 }, (_, power) => power);
  const dotted = (y, name, yref, xref) => ({
    type: "line", xref, yref, x0: edges[0], x1: edges.at(-1), y0: y, y1: y,
    line: { color: colour(name), width: 1.5, dash: "dot" },
  });
  // Axes without any point have no place, which the heatmap's axis shares: a search that has just begun needs one.
  const some = (series) => (series[0].length ? series : [[edges[0]], [null]]);
  const solid = { line: { color: colour("accent"), width: 2 } };
  const data = [{
    // The colour is a logarithm, so that a single gate still shows beside thousands.
    type: "heatmap", xaxis: "x2", x: edges, y: Array.from({ length: bins + 1 }, (_, i) => i / bins),
    z: byBin.map((row) => row.map((count) => (count ? Math.log10(count) : null))), zmin: 0, zmax: Math.log10(most),
    customdata: byBin.map((row) => row.map((count, i) => [count, delta[i]])), hoverongaps: false,
    hovertemplate: "%{customdata[0]} gates near %{y:.3f}<br>delta %{customdata[1]}<extra></extra>",
    colorscale: [0, 1, 2, 3, 4].map((i) => [i / 4, colour("heat-" + i)]),
    colorbar: {
      ...title("gates"), thickness: 8, x: 1.01, y: 1, yanchor: "top", len: 0.5, outlinewidth: 0,
      tickvals: powers, ticktext: powers.map((power) => ["1", "10", "100", "1k", "10k", "100k"][power]),
    },
  },
  line(some(open), "open gates", { yaxis: "y2", hovertemplate: "%{y:.1%}", ...solid }),
  line(some(macs), "expected multiply-adds", { yaxis: "y3", hovertemplate: "%{y:.3s}", ...solid })];
  if (compact !== null) {
    data.push(line([[edges.at(-1)], [compact]], "compact network", {
      yaxis: "y3", mode: "markers", marker: diamond(), cliponaxis: false, hovertemplate: "%{y:.3s}",
    }));
  }
  const shapes = [];
  if (threshold !== null) shapes.push(dotted(threshold, "second", "y", "x2"));
  if (full !== null) shapes.push(dotted(full, "muted", "y3", "x"));
  const every = Math.ceil(delta.length / 5);
  const ticks = delta.map((_, i) => i).filter((i) => i % every === 0);
  return [data, layout(700, 56, {
    hovermode: "closest", shapes, margin: { l: 62, r: 44, t: 56, b: 46 },
    xaxis: axis({ anchor: "y3", range: [edges[0], edges.at(-1)], ...title("epochs of the search") }),
    xaxis2: axis({
      anchor: "y", side: "top", matches: "x", showgrid: false, ...title("delta", 4),
      tickvals: ticks.map((i) => epochs[i]), ticktext: ticks.map((i) => delta[i]),
    }),
    yaxis: axis({ domain: [0.52, 1], range: [0, 1], showgrid: false, ...title("gate", 8) }),
    yaxis2: axis({ domain: [0.29, 0.47], tickformat: ".0%", rangemode: "tozero", nticks: 5, ...title("open gates", 8) }),
    yaxis3: axis({ domain: [0, 0.24], tickformat: "~s", rangemode: "tozero", nticks: 5, ...title("multiply-adds", 8) }),
  })];
}

// Where each label goes, as Plotly names it: the first place that covers no other mark and no label before it.
function placed(points) {
  const taken = points.map(({ px, py }) => [px - 6, py - 6, px + 6, py + 6]);
  const free = (box) => !taken.some(([a, b, c, d]) => box[0] < c && a < box[2] && box[1] < d && b < box[3]);
  return points.map(({ px, py, text, width }) => {
    const long = 6.2 * text.length;
    const places = [["top center", -0.5, -1], ["bottom center", -0.5, 1], ["middle right", 0, 0], ["middle left", -1, 0],
      ["top right", 0, -1], ["top left", -1, -1], ["bottom right", 0, 1], ["bottom left", -1, 1]];
    for (const [place, across, down] of places) {
      const aside = across === -0.5 ? 0 : across ? -7 : 7;
      const x = px + across * long + aside, y = py + 13 * down - 6;
      const box = [x, y, x + long, y + 12];
      if (x < 0 || x + long > width || !free(box)) continue;
      taken.push(box);
      return place;
    }
    return null;
  });
}

function published() {
  const { axis: size, log, comparable, points } = run.published;
  const height = 460, width = document.getElementById("published").clientWidth - 76;
  const kinds = ["own", "baseline", "dnal", "others"];
  const at = (x) => (log ? Math.log10(x) : x);
  const all = kinds.flatMap((kind) => points[kind][0].map((x, i) => ({ kind, x, y: points[kind][1][i], text: points[kind][2][i] })));
  const span = (values) => [Math.min(...values), Math.max(...values)];
  const wider = ([low, high]) => [low - 0.07 * (high - low || 1), high + 0.07 * (high - low || 1)];
  const xs = wider(span(all.map((p) => at(p.x)))), ys = wider(span(all.map((p) => p.y)));
  const where = placed(all.map((p) => ({
    text: p.text, width, px: (width * (at(p.x) - xs[0])) / (xs[1] - xs[0]),
    py: ((height - 62) * (ys[1] - p.y)) / (ys[1] - ys[0]),
  })));
  const marks = {
    own: { ...diamond(), symbol: comparable ? "diamond" : "diamond-open", line: { width: 2, color: colour("second") } },
    baseline: { symbol: "square", size: 9, color: colour("muted") },
    dnal: { size: 8, color: colour("accent") },
    others: { size: 7, color: colour("muted") },
  };
  const ink = { own: "second", dnal: "accent", baseline: "ink", others: "muted" };
  const data = [...kinds].reverse().filter((kind) => points[kind][0].length).map((kind) => {
    const mine = all.map((p, i) => ({ ...p, place: where[i] })).filter((p) => p.kind === kind);
    return line([mine.map((p) => p.x), mine.map((p) => p.y)], kind, {
      mode: kind === "dnal" ? "lines+markers+text" : "markers+text", marker: marks[kind], cliponaxis: false,
      text: mine.map((p) => (p.place ? plain(p.text) : "")), textposition: mine.map((p) => p.place ?? "top center"),
      textfont: { size: 11, color: colour(ink[kind]) }, line: { color: colour("accent"), width: 2 },
      customdata: mine.map((p) => plain((kind === "dnal" ? "DNAL " : "") + p.text)),
      hovertemplate: "%{customdata}<br>%{x}, %{y}<extra></extra>",
    });
  });
  const digits = xs[1] - xs[0] > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  const ticks = [-3, -2, -1, 0, 1, 2].flatMap((power) => digits.map((digit) => Number(digit + "e" + power)));
  return [data, layout(height, 16, {
    hovermode: "closest",
    xaxis: axis({ range: xs, ...(log ? { type: "log", tickvals: ticks, ticktext: ticks.map(String) } : {}), ...title(size) }),
    yaxis: axis({ range: ys, ...title("top-1 (%)", 8) }),
  })];
}

function draw() {
  const narrow = matchMedia("(max-width: 40rem)").matches;
  const config = {
    responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    // Plotly would offer to upload the figure.
    showSendToCloud: false, plotlyServerURL: "",
  };
  for (const [id, figure] of [["curves", curves], ["search", search], ["published", published]]) {
    if (document.getElementById(id)) Plotly.react(id, ...figure(), config);
  }
}
draw();
for (const query of ["(prefers-color-scheme: dark)", "(max-width: 40rem)"]) matchMedia(query).addEventListener("change", draw);
