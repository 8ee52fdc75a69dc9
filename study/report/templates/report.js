"use strict";
// Every column of a sortable table gets a sort button; empty cells stay last in both directions.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => row.cells[column].dataset.sort;
  const sort = (column, ascending) => {
    const isNumber = headers[column].classList.contains("number");
    const sign = ascending ? 1 : -1;
    const compare = (first, second) => {
      const a = key(first, column);
      const b = key(second, column);
      if (a === "" || b === "") return (a === "" ? 1 : 0) - (b === "" ? 1 : 0);
      if (isNumber) return sign * (Number(a) - Number(b));
      return sign * a.localeCompare(b, "en", { numeric: true });
    };
    body.append(...[...body.rows].sort(compare));
    for (const header of headers) header.removeAttribute("aria-sort");
    headers[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  };
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sort(column, header.getAttribute("aria-sort") !== "ascending"));
  });
}
// Folded parts are printed too.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
