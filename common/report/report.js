// Sorting by a click, and a number's source opened where its link leads: all else is plain HTML.
for (const button of document.querySelectorAll("#board button.sort")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), place = head.cellIndex, body = document.querySelector("#board tbody");
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => Number(row.cells[place].dataset.value ?? (down ? -Infinity : Infinity));
    body.append(...[...body.rows].sort((a, b) => down ? value(b) - value(a) : value(a) - value(b)));
  });
}
const reveal = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", reveal);
for (const link of document.querySelectorAll('a[href^="#from-"]')) link.addEventListener("click", () => setTimeout(reveal));
reveal();
