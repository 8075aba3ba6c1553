"use strict";

const plots = [...document.querySelectorAll(".plot")];

for (const plot of plots) {
  const figure = JSON.parse(document.querySelector(`script[data-plot="${plot.id}"]`).textContent);
  // On a touch screen a drag is for scrolling the page, not for zooming the chart.
  if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;
  Plotly.newPlot(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false });
}

function sortRows(table, column, direction) {
  const body = table.tBodies[0];
  const valueOf = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)];
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return direction === "ascending" ? order : -order;
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const first = heading.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const direction = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", direction);
      sortRows(table, column, direction);
    });
  });
}

// Paper has no fold to open and another width than the window.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
});
