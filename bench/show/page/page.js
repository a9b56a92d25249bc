"use strict";
// A click on a header sorts by it, another click the other way. Empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, heads, column));
    head.append(button);
  });
  table.dataset.sorting = "ready";
}

function sort(table, heads, column) {
  const falling = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.key.replace(/ ?(%|dB)$/, "");
  const rows = [...table.tBodies[0].rows];
  const numeric = rows.every((row) => key(row) === "" || Number.isFinite(Number(key(row))));
  rows.sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
    return falling ? -order : order;
  });
  table.tBodies[0].append(...rows);
}
