"""What the Vulkan loader of this machine offers, on which WebGPU outside of browsers computes.

It is read through the loader's C interface, so that a probe needs neither package nor tool.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

CPU = 4
"""VK_PHYSICAL_DEVICE_TYPE_CPU: a driver that computes on the host."""
WANTED = {
    33: "shaderUniformBufferArrayDynamicIndexing",
    34: "shaderSampledImageArrayDynamicIndexing",
    35: "shaderStorageBufferArrayDynamicIndexing",
    36: "shaderStorageImageArrayDynamicIndexing",
}
"""Place in VkPhysicalDeviceFeatures -> name, of what Dawn asks of a device before all else. Mesa
22.3's software device lacks two of them, Mesa 25.0's has all."""


@dataclass(frozen=True)
class VulkanDevice:
    """A physical device as its driver names it.

    Attributes:
        software: whether the driver computes on the host's CPU.
        lacks: the features that WebGPU needs and it has not.
    """

    name: str
    software: bool
    lacks: tuple[str, ...]


@cache
def vulkan_devices() -> tuple[VulkanDevice, ...]:
    """Return the devices in the loader's order; () where there is no loader, or no driver."""
    try:
        loader = ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return ()
    request = (ctypes.c_uint64 * 8)(1)  # VkInstanceCreateInfo: its sType, and nothing else
    instance = ctypes.c_void_p()
    if loader.vkCreateInstance(request, None, ctypes.byref(instance)):
        return ()
    try:
        count = ctypes.c_uint32()
        loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
        handles = (ctypes.c_void_p * count.value)()
        loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
        return tuple(_described(loader, ctypes.c_void_p(handle)) for handle in handles)
    finally:
        loader.vkDestroyInstance(instance, None)


def _described(loader: ctypes.CDLL, handle: ctypes.c_void_p) -> VulkanDevice:
    properties = ctypes.create_string_buffer(4096)  # VkPhysicalDeviceProperties takes 824
    loader.vkGetPhysicalDeviceProperties(handle, properties)
    features = (ctypes.c_uint32 * 1024)()  # VkPhysicalDeviceFeatures takes 55
    loader.vkGetPhysicalDeviceFeatures(handle, features)
    return VulkanDevice(
        name=properties.raw[20:276].split(b"\0")[0].decode(errors="replace"),
        software=int.from_bytes(properties.raw[16:20], "little") == CPU,
        lacks=tuple(name for place, name in WANTED.items() if not features[place]),
    )
