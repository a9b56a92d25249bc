// Not a module: it runs where modules do not, on a page that was opened as a file.
if (location.protocol === "file:") {
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("words").textContent = "opened as a file";
    document.getElementById("veil-words").textContent =
      "browsers load no modules from files: addbench serve --static FOLDER, or any static host";
  });
}
