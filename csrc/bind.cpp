// The Python module itself: empty. Importing it loads the library, whose static registrations add the kernels.
#include <Python.h>

#define LIC_FAST_JOIN_(a, b) a##b
#define LIC_FAST_JOIN(a, b) LIC_FAST_JOIN_(a, b)
#define LIC_FAST_STRING_(a) #a
#define LIC_FAST_STRING(a) LIC_FAST_STRING_(a)

// Which sources this library was built from; read from the file before it is loaded.
extern "C" __attribute__((visibility("default"), used)) const char lic_fast_stamp[] =
    "lic_fast_stamp=" LIC_FAST_STRING(LIC_FAST_STAMP);

extern "C" __attribute__((visibility("default"))) PyObject* LIC_FAST_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               LIC_FAST_STRING(TORCH_EXTENSION_NAME),
                               nullptr,
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
