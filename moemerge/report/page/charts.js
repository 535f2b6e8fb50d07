// Hover and zoom for charts, by plotly, which is read when the first chart comes near the window: until then,
// and without it, their still pictures are there.
const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
const isNarrow = () => innerWidth < 640;

function paper(layout) {
  const axis = { gridcolor: colour("--rule"), zerolinecolor: colour("--rule"), automargin: true };
  return {
    margin: { l: 60, r: 16, t: 10, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
    hoverlabel: { bgcolor: colour("--box"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
    legend: { orientation: "h", y: isNarrow() ? -0.35 : -0.2 },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

function bar(text) {
  return isNarrow()
    ? { title: { text, side: "top" }, orientation: "h", y: 1.02, yanchor: "bottom", thickness: 12 }
    : { title: { text, side: "right" }, thickness: 18 };
}

function gridTraces(spec) {
  const words = spec.notes.map((row) => row.map((place) => spec.words[place]));
  const more = words.length ? "<br>%{text}" : "";
  return [{
    type: "heatmap", z: spec.values, x: spec.columns, y: spec.rows, text: words.length ? words : undefined,
    zmin: 0, zmax: spec.top, colorscale: report.scale, colorbar: bar(spec.unit),
    hovertemplate: `${spec.y_title} %{y}, ${spec.x_title} %{x}: %{z:.4g}${more}<extra></extra>`,
  }];
}

function gridLayout(spec) {
  const wide = spec.groups ? spec.columns.length / spec.groups : 0;
  const lines = [];
  for (let group = 1; group < spec.groups; group++) {
    const x = group * wide - 0.5;
    lines.push({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: "#ffffff", width: 2 } });
  }
  return {
    shapes: lines,
    xaxis: { title: { text: spec.x_title }, type: "category" },
    yaxis: { title: { text: spec.y_title }, type: "category", autorange: "reversed" },
  };
}

function draw(figure) {
  const spec = report.charts[figure.dataset.chart];
  const place = figure.querySelector(".plot");
  const isGrid = spec.kind === "grid";
  const layout = () => paper(isGrid ? gridLayout(spec) : spec.layout);
  place.hidden = false;
  figure.querySelector(".static").hidden = true;
  Plotly.newPlot(place, isGrid ? gridTraces(spec) : spec.data, layout(), options);
  repaints.set(figure, () => Plotly.relayout(place, layout()));
}

// The policy of the page allows this text alone to become a script.
function readPlotly() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = byId("plotly").textContent;
  document.head.append(script);
}

function startCharts() {
  if (!byId("plotly")) return;
  const watcher = new IntersectionObserver((entries) => {
    const near = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
    for (const figure of near) watcher.unobserve(figure);
    // First what was asked for is painted, then a second of reading.
    if (near.length) requestIdleCallback(() => { readPlotly(); near.forEach(draw); });
  }, { rootMargin: "200px" });
  for (const figure of document.querySelectorAll("[data-chart]")) watcher.observe(figure);
}

const canUnpack = "DecompressionStream" in window;
(viewer && canUnpack ? startViewer() : Promise.resolve()).then(() => {
  startCharts();
  performance.mark("ready");
  root.dataset.ready = "yes";
});
